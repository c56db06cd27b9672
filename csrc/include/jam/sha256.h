// SHA-256 (FIPS 180-4) of sixteen messages at once, each in a lane of a vector. One message's
// rounds wait for one another, also in the instructions that processors have for it; those of
// others do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "jam/for_each_cpu.h"

// Vectors go between inlined functions alone, so that no calling convention matters.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace jam {

constexpr int kShaLanes = 16;
constexpr int kShaWords = 8;
constexpr size_t kShaBlock = 64;
// Bytes of a message between what is hashed and what is asked for from memory.
constexpr size_t kShaAhead = 512;

// State of all messages: word by word, a message to a column.
using ShaStates = uint32_t[kShaWords][kShaLanes];

using ShaVector = uint32_t __attribute__((vector_size(64)));
using ShaBytes = uint8_t __attribute__((vector_size(64)));

constexpr uint32_t kShaRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline JAM_ALWAYS_INLINE ShaVector sha_rotated(ShaVector x, int by) {
  return (x >> by) | (x << (32 - by));
}

// Of the numbers of a and then b those that `which` says. Clang has no operation for it that takes
// a vector, and makes one of the loop where it can.
template <typename Vector>
inline JAM_ALWAYS_INLINE Vector sha_shuffled(Vector a, Vector b, Vector which) {
#ifdef __clang__
  constexpr int kCount = sizeof(Vector) / sizeof(a[0]);
  Vector out;
  for (int i = 0; i < kCount; ++i)
    out[i] = static_cast<int>(which[i]) < kCount ? a[which[i]] : b[which[i] - kCount];
  return out;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

// Two rows of a square become columns of blocks of twice the size: log2(16) such steps transpose
// it.
template <int kSize>
inline JAM_ALWAYS_INLINE void sha_transpose_step(ShaVector* rows) {
  ShaVector upper, lower;
  for (int i = 0; i < kShaLanes; ++i) {
    upper[i] = (i & kSize) ? kShaLanes + i - kSize : i;
    lower[i] = (i & kSize) ? kShaLanes + i : i + kSize;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kShaLanes; ++i) {
    if (i & kSize) continue;
    const ShaVector a = rows[i], b = rows[i + kSize];
    rows[i] = sha_shuffled(a, b, upper);
    rows[i + kSize] = sha_shuffled(a, b, lower);
  }
}

// The sixteen big-endian words of each message's block, word by word.
inline JAM_ALWAYS_INLINE void sha_load(const uint8_t* const* messages, size_t at,
                                       ShaVector* words) {
  ShaBytes swapped;
  for (int i = 0; i < static_cast<int>(kShaBlock); ++i) swapped[i] = i ^ 3;
#pragma GCC unroll 16
  for (int lane = 0; lane < kShaLanes; ++lane) {
    ShaBytes block;
    memcpy(&block, messages[lane] + at, kShaBlock);
    __builtin_prefetch(messages[lane] + at + kShaAhead);
    block = sha_shuffled(block, block, swapped);
    memcpy(&words[lane], &block, kShaBlock);
  }
  sha_transpose_step<1>(words);
  sha_transpose_step<2>(words);
  sha_transpose_step<4>(words);
  sha_transpose_step<8>(words);
}

// Takes `blocks` blocks of 64 bytes of each message into the states.
inline JAM_ALWAYS_INLINE void sha_update(ShaStates& states, const uint8_t* const* messages,
                                         size_t blocks) {
  ShaVector state[kShaWords];
  memcpy(state, states, sizeof(state));
  for (size_t block = 0; block < blocks; ++block) {
    ShaVector w[16], s[kShaWords];
    sha_load(messages, block * kShaBlock, w);
    memcpy(s, state, sizeof(s));
#pragma GCC unroll 64
    for (int round = 0; round < 64; ++round) {
      if (round >= 16) {
        const ShaVector x = w[(round + 1) & 15], y = w[(round + 14) & 15];
        w[round & 15] += w[(round + 9) & 15] + (sha_rotated(x, 7) ^ sha_rotated(x, 18) ^ (x >> 3)) +
                         (sha_rotated(y, 17) ^ sha_rotated(y, 19) ^ (y >> 10));
      }
      // The eight words change their names from round to round, in place of moving.
      const auto word = [&](int i) -> ShaVector& { return s[(64 + i - round) & 7]; };
      const ShaVector a = word(0), b = word(1), c = word(2), e = word(4), f = word(5), g = word(6);
      const ShaVector sum = word(7) +
                            (sha_rotated(e, 6) ^ sha_rotated(e, 11) ^ sha_rotated(e, 25)) +
                            ((e & f) ^ (~e & g)) + kShaRounds[round] + w[round & 15];
      word(3) += sum;
      word(7) = sum + (sha_rotated(a, 2) ^ sha_rotated(a, 13) ^ sha_rotated(a, 22)) +
                ((a & b) ^ (a & c) ^ (b & c));
    }
    for (int i = 0; i < kShaWords; ++i) state[i] += s[i];
  }
  memcpy(states, state, sizeof(state));
}

}  // namespace jam
