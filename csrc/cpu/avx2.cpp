// Guided sampling with AVX2, FMA and F16C: eight ids at a time.
#include <algorithm>
#include <cmath>

#include "cpu/workspace.h"
#include "jam/backend.h"
#include "jam/guided_draw.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

// For all that follows; what the headers above define is compiled for any CPU.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace jam {
namespace {

struct Lanes {
  static constexpr int kWidth = 8;
  using Floats = __m256;
  using Mask = __m256;
  struct Sum {
    __m256d lower, upper;
  };

  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static Floats load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static Floats minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static float max_of(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  static Mask none() { return _mm256_setzero_ps(); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static bool any(Mask a) { return _mm256_movemask_ps(a) != 0; }
  static Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Mask legal(const bool* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m256i words = _mm256_cvtepi8_epi32(bytes);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(words, _mm256_setzero_si256()));
  }
  static Mask not_below_infinity(Floats a) { return _mm256_cmp_ps(a, all(kInfinity), _CMP_NLT_UQ); }
  static Floats select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }

  // As weight_of. Adding and subtracting 1.5 2^23 rounds to the nearest integer, the even one of
  // two, and leaves it in the lower bits, from where it goes into the power's exponent.
  static Floats weights(Floats logits, Floats max, Floats scale) {
    const Floats exponent = _mm256_mul_ps(_mm256_sub_ps(logits, max), scale);
    const Floats shift = all(0x1.8p23f + kWeightBits);
    const Floats shifted = _mm256_add_ps(exponent, shift);
    const Floats f = _mm256_sub_ps(exponent, _mm256_sub_ps(shifted, shift));
    Floats power = fused(all(kExp2C5), f, all(kExp2C4));
    power = fused(power, f, all(kExp2C3));
    power = fused(power, f, all(kExp2C2));
    power = fused(power, f, all(kExp2C1));
    power = fused(power, f, all(1.0f));
    const __m256i whole = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), whole));
    const Floats rounded = _mm256_round_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_and_ps(rounded, _mm256_cmp_ps(exponent, all(kSmallestExponent), _CMP_GT_OQ));
  }
  static Floats where_above(Floats a, Floats floor) {
    return _mm256_and_ps(a, _mm256_cmp_ps(a, floor, _CMP_GT_OQ));
  }
  static Sum zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Sum add(Sum sum, Floats a) {
    return {_mm256_add_pd(sum.lower, _mm256_cvtps_pd(_mm256_castps256_ps128(a))),
            _mm256_add_pd(sum.upper, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)))};
  }
  static double sum_of(Sum sum) {
    const __m256d both = _mm256_add_pd(sum.lower, sum.upper);
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
};

#include "cpu/guided_rows.h"

constexpr Backend kBackend{"avx2", sample, probabilities, largest, weights};

}  // namespace
}  // namespace jam

#pragma GCC pop_options

namespace jam {

const Backend* avx2_backend() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return here ? &kBackend : nullptr;
}

}  // namespace jam

#else

namespace jam {
const Backend* avx2_backend() { return nullptr; }
}  // namespace jam

#endif
