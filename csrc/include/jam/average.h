// share * a + (1 - share) * b in one pass over memory, rounded once to the inputs' format.
#pragma once

#include <cstdint>

#include "jam/logits.h"

// One compiled function for each of these instruction sets; the loader takes the best there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAM_FOR_EACH_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAM_FOR_EACH_CPU
#endif

namespace jam {

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To the nearest, of two the even one; a NaN stays one.
inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7FC0u)};
}

// The same. Every case is computed and one of them taken, so that compilers make vectors of it.
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

inline void round_to(float value, BFloat16& out) { out = to_bfloat16(value); }
inline void round_to(float value, Float16& out) { out = to_float16(value); }

template <typename Half>
inline __attribute__((always_inline)) void average_halves(const Half* a, const Half* b, Half* out,
                                                          int64_t size, float of_a, float of_b) {
  for (int64_t i = 0; i < size; ++i)
    round_to(to_float(a[i]) * of_a + to_float(b[i]) * of_b, out[i]);
}

template <typename Value>
inline __attribute__((always_inline)) void average_wholes(const Value* a, const Value* b,
                                                          Value* out, int64_t size, double of_a,
                                                          double of_b) {
  for (int64_t i = 0; i < size; ++i)
    out[i] =
        static_cast<Value>(static_cast<double>(a[i]) * of_a + static_cast<double>(b[i]) * of_b);
}

}  // namespace jam
