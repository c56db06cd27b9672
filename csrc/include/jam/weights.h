// Sampling weights: probabilities as integers, the same bits on every backend.
//
// The weight of an id is 2^36 exp((logit - max) / temperature), rounded to an integer. Up to 2^17
// of them have a float64 sum that is exact in any order, so a draw does not depend on blocking,
// shards or threads. Float operations are rounded one by one, or fused where written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "jam/host_device.h"

namespace jam {

constexpr int64_t kMaxVocabulary = int64_t{1} << 17;
constexpr float kInfinity = HUGE_VALF;
constexpr int kWeightBits = 36;
constexpr float kSmallestExponent = -40.0f;  // what is below weighs less than a half, so nothing

// 2^f = 1 + f (c1 + f (c2 + ...)) for |f| <= 1/2, to 1.1e-7 relative; exactly 1 at f = 0.
constexpr float kExp2C1 = 0x1.62e42ap-1f, kExp2C2 = 0x1.ebf9bcp-3f, kExp2C3 = 0x1.c6b752p-5f,
                kExp2C4 = 0x1.3cea88p-7f, kExp2C5 = 0x1.5bba14p-10f;

JAM_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

JAM_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Arithmetic that no compiler flag may contract or reorder.
#ifdef __CUDA_ARCH__
JAM_HOST_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
JAM_HOST_DEVICE float nearest(float a) { return rintf(a); }
#else
JAM_HOST_DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
JAM_HOST_DEVICE float nearest(float a) { return std::nearbyint(a); }
#endif

// `scale` is log2(e) / temperature.
JAM_HOST_DEVICE float weight_of(float logit, float max, float scale) {
  const float exponent = (logit - max) * scale;
  if (!(exponent > kSmallestExponent)) return 0.0f;  // also what keeps -inf out
  const float whole = nearest(exponent), f = exponent - whole;
  float power = fused(kExp2C5, f, kExp2C4);
  power = fused(power, f, kExp2C3);
  power = fused(power, f, kExp2C2);
  power = fused(power, f, kExp2C1);
  power = fused(power, f, 1.0f);
  const uint32_t biased = static_cast<uint32_t>(static_cast<int32_t>(whole) + kWeightBits + 127);
  return nearest(power * float_from_bits(biased << 23));
}

// What min_p keeps: a weight w >= min_p 2^36, written as w > floor.
JAM_HOST_DEVICE float min_p_floor(double min_p) {
  const double smallest = min_p * static_cast<double>(int64_t{1} << kWeightBits);
  float least =
      static_cast<float>(smallest);  // the nearest; then the least float that is not below
  if (static_cast<double>(least) < smallest) least = float_from_bits(bits_of(least) + 1);
  return least > 0 ? float_from_bits(bits_of(least) - 1) : 0.0f;
}

// The search for the smallest weight to keep goes digit by digit, from the top, through the bits of
// the weights: 29 of them, as weights above 0 are floats from 1 to 2^36, whose bits are in order.
constexpr int kNumDigits = 4, kNumBuckets = 1 << 8;

JAM_HOST_DEVICE uint32_t key_of(float weight) { return bits_of(weight) - 0x3F800000u; }
// The floor just below the weight of a key.
JAM_HOST_DEVICE float floor_of_key(uint32_t key) { return float_from_bits(key + 0x3F7FFFFFu); }
JAM_HOST_DEVICE int shift_of_digit(int digit) { return 7 * (kNumDigits - 1 - digit); }
JAM_HOST_DEVICE int buckets_of_digit(int digit) { return digit == 0 ? 1 << 8 : 1 << 7; }

// Some weights: their sum and their number.
struct Mass {
  double sum;
  int32_t count;
};

// Ids are kept, by falling weight, until their sum reaches `sum` or their number `count`.
struct Quota {
  double sum;
  int64_t count;

  JAM_HOST_DEVICE bool reached_by(Mass mass) const {
    return mass.sum >= sum || mass.count >= count;
  }
};

// The highest bucket with which, after what has `passed`, a quota is reached, or -1. The buckets
// above it are added to `passed`.
JAM_HOST_DEVICE int bucket_of(Quota quota, const Mass* buckets, int num, Mass& passed) {
  for (int bucket = num - 1; bucket >= 0; --bucket) {
    const Mass next{passed.sum + buckets[bucket].sum, passed.count + buckets[bucket].count};
    if (quota.reached_by(next)) return bucket;
    passed = next;
  }
  return -1;
}

}  // namespace jam
