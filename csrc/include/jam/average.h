// share * a + (1 - share) * b in one pass over memory, rounded once to the inputs' format.
#pragma once

#include <cstdint>

#include "jam/for_each_cpu.h"
#include "jam/logits.h"

namespace jam {

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The high half of what this gives is a bfloat16: the nearest, of two the even one. A NaN stays
// one, as those that come of bfloat16s have a low half of zeros, which carries nothing into the
// high one.
inline uint32_t rounded_to_high_half(float value) {
  const uint32_t bits = bits_from_float(value);
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

// The nearest, of two the even one. Every case is computed and one of them taken, so that compilers
// make vectors of it.
inline Float16 to_float16(float value) {
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Added to 1/2, a subnormal's last place is the float's.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65,520 and more are infinite
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

// Numbers in a page of memory and in a line of the cache; pages that are read side by side. The
// hardware looks ahead within a page alone: of several it asks for more at a time.
constexpr int64_t kPage = 2048, kLine = 32, kPages = 4;

// Two numbers at a time, as halves of 32 bits: no vector is widened or narrowed.
inline JAM_ALWAYS_INLINE void average_pairs(const BFloat16* a, const BFloat16* b, BFloat16* out,
                                            int64_t pairs, float of_a, float of_b) {
  for (int64_t i = 0; i < pairs; ++i) {
    uint32_t x, y;
    memcpy(&x, a + 2 * i, sizeof(x));
    memcpy(&y, b + 2 * i, sizeof(y));
    const uint32_t low =
        rounded_to_high_half(float_from_bits(x << 16) * of_a + float_from_bits(y << 16) * of_b);
    const uint32_t high = rounded_to_high_half(float_from_bits(x & 0xFFFF0000u) * of_a +
                                               float_from_bits(y & 0xFFFF0000u) * of_b);
    const uint32_t both = (low >> 16) | (high & 0xFFFF0000u);
    memcpy(out + 2 * i, &both, sizeof(both));
  }
}

inline JAM_ALWAYS_INLINE void average_halves(const BFloat16* a, const BFloat16* b, BFloat16* out,
                                             int64_t size, float of_a, float of_b) {
  constexpr int64_t kPiece = kPages * kPage;
  int64_t done = 0;
  for (; done + kPiece <= size; done += kPiece) {
    for (int64_t line = done; line < done + kPage; line += kLine) {
      for (int64_t i = line; i < line + kPiece; i += kPage) {
        __builtin_prefetch(a + i + kPiece);
        __builtin_prefetch(b + i + kPiece);
        average_pairs(a + i, b + i, out + i, kLine / 2, of_a, of_b);
      }
    }
  }
  average_pairs(a + done, b + done, out + done, (size - done) / 2, of_a, of_b);
  if (size % 2)
    out[size - 1].bits = static_cast<uint16_t>(
        rounded_to_high_half(to_float(a[size - 1]) * of_a + to_float(b[size - 1]) * of_b) >> 16);
}

inline JAM_ALWAYS_INLINE void average_halves(const Float16* a, const Float16* b, Float16* out,
                                             int64_t size, float of_a, float of_b) {
  for (int64_t i = 0; i < size; ++i)
    out[i] = to_float16(to_float(a[i]) * of_a + to_float(b[i]) * of_b);
}

template <typename Value>
inline JAM_ALWAYS_INLINE void average_wholes(const Value* a, const Value* b, Value* out,
                                             int64_t size, double of_a, double of_b) {
  for (int64_t i = 0; i < size; ++i)
    out[i] =
        static_cast<Value>(static_cast<double>(a[i]) * of_a + static_cast<double>(b[i]) * of_b);
}

}  // namespace jam
