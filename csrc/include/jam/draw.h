// Random numbers as a pure function of (key, index): any stretch of a tensor can be drawn by
// itself, and sixteen at a time. Every operation is rounded by itself, so every processor gives the
// same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "jam/for_each_cpu.h"
#include "jam/weights.h"

namespace jam {

constexpr int kDrawLanes = 16;
constexpr int kDrawBlock = 4 * kDrawLanes;  // numbers of sixteen counters

// The quantile of the normal distribution at (1 + u) / 2 is u * P(w), w = -ln(1 - u^2) (after
// Giles 2010, "Approximating the erfinv function"). Fitted here, to 3e-7 relative: in w - 2.625 up
// to w = 5.25, which is three sigma, beyond in w - 10.275, up to 5.3 sigma.
constexpr float kQuantileNear[] = {
    2.166818141937256f,       0.34724536538124084f,    -0.006543918512761593f,
    -0.001620317343622446f,   0.00030377000803127885f, -9.520093044557143e-06f,
    -4.4225826059118845e-06f, 4.967770905750513e-07f,  2.7617229392262743e-08f};
constexpr float kQuantileFar[] = {
    4.297974109649658f,      0.22164452075958252f,     -0.005189978983253241f,
    0.00022937021276447922f, -1.1198821994184982e-05f, 4.992754725208215e-07f,
    -1.617156852873336e-09f, -7.260082757198916e-09f,  8.295828468618538e-10f};
constexpr float kNearCentre = 2.625f, kFarCentre = 10.275f, kNearEnd = 5.25f;
// ln(1 + r) = r * L(r) for r in -1/3 .. 1/3, to 1e-7.
constexpr float kLogarithm[] = {0.9999998211860657f,   -0.4999993145465851f, 0.3333798944950104f,
                                -0.25008025765419006f, 0.1979503035545349f,  -0.16412799060344696f,
                                0.1711122691631317f,   -0.15403155982494354f};

template <int kCount>
inline JAM_ALWAYS_INLINE float polynomial(const float (&coefficients)[kCount], float x) {
  float value = coefficients[kCount - 1];
  for (int i = kCount - 2; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

// -ln(x) for x in 2^-23 .. 1.
inline JAM_ALWAYS_INLINE float negative_logarithm(float x) {
  constexpr uint32_t kTwoThirds = 0x3F2AAAABu;
  const uint32_t bits = bits_of(x);
  const int32_t exponent = static_cast<int32_t>(bits - kTwoThirds) >> 23;
  const float r = float_from_bits(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  return -(static_cast<float>(exponent) * 0.69314718f + r * polynomial(kLogarithm, r));
}

// The middle of one of 2^23 equal steps in -1 .. 1, exactly.
inline JAM_ALWAYS_INLINE float symmetric_uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(2 * (word >> 9) + 1)) * 0x1p-23f - 1.0f;
}

template <bool kIsCut>
inline JAM_ALWAYS_INLINE float normal_quantile(float u) {
  const float w = negative_logarithm((1.0f - u) * (1.0f + u));
  const float near = polynomial(kQuantileNear, w - kNearCentre);
  if (kIsCut) return u * near;
  const float far = polynomial(kQuantileFar, w - kFarCentre);
  return u * (w > kNearEnd ? far : near);
}

inline JAM_ALWAYS_INLINE uint32_t rotated_left(uint32_t x, int by) {
  return (x << by) | (x >> (32 - by));
}

// Threefry4x32-20 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of counters
// first .. first + 15: word k of counter first + lane goes to words[16 * k + lane]. It adds, turns
// and xors 32 bits, which every processor does in vectors; Philox multiplies to 64.
inline JAM_ALWAYS_INLINE void threefry(uint64_t key, uint64_t first, uint32_t* words) {
  constexpr int kTurns[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                {6, 20},  {17, 11}, {25, 10}, {18, 20}};
  const uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  const uint32_t keys[5] = {key0, key1, 0u, 0u, 0x1BD11BDAu ^ key0 ^ key1};
  for (int lane = 0; lane < kDrawLanes; ++lane) {
    const uint64_t counter = first + static_cast<uint64_t>(lane);
    uint32_t x[4] = {static_cast<uint32_t>(counter) + keys[0],
                     static_cast<uint32_t>(counter >> 32) + keys[1], keys[2], keys[3]};
#pragma GCC unroll 20
    for (uint32_t round = 0; round < 20; ++round) {
      const int other = round % 2 ? 3 : 1;
      x[0] += x[other];
      x[other] = rotated_left(x[other], kTurns[round % 8][0]) ^ x[0];
      x[2] += x[4 - other];
      x[4 - other] = rotated_left(x[4 - other], kTurns[round % 8][1]) ^ x[2];
      if (round % 4 < 3) continue;
      const uint32_t step = round / 4 + 1;
      for (uint32_t k = 0; k < 4; ++k) x[k] += keys[(step + k) % 5];
      x[3] += step;
    }
    for (int k = 0; k < 4; ++k) words[k * kDrawLanes + lane] = x[k];
  }
}

enum class Draw { kUniform, kCutNormal, kNormal };

// Of the normal distribution between -3 and 3 sigma, a little less: nothing is beyond.
constexpr float kInsideCut = 0.9973f;

// Numbers start .. start + count - 1: uniform in -scale .. scale, or normal with deviation `scale`,
// whole or cut at 3 sigma.
template <Draw kKind>
inline JAM_ALWAYS_INLINE void draw(float* out, int64_t start, int64_t count, uint64_t key,
                                   float scale) {
  constexpr bool kIsCut = kKind == Draw::kCutNormal;
  uint32_t words[kDrawBlock];
  float values[kDrawBlock];
  for (int64_t done = 0; done < count;) {
    const int64_t block = (start + done) / kDrawBlock, skipped = (start + done) % kDrawBlock;
    threefry(key, static_cast<uint64_t>(block * kDrawLanes), words);
    for (int i = 0; i < kDrawBlock; ++i) {
      const float u = symmetric_uniform(words[i]);
      values[i] =
          scale *
          (kKind == Draw::kUniform ? u : normal_quantile<kIsCut>(kIsCut ? u * kInsideCut : u));
    }
    const int64_t taken = std::min<int64_t>(kDrawBlock - skipped, count - done);
    memcpy(out + done, values + skipped, taken * sizeof(float));
    done += taken;
  }
}

}  // namespace jam
