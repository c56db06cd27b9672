// Guided sampling with AVX-512: sixteen ids at a time.
#include <algorithm>
#include <cmath>

#include "cpu/workspace.h"
#include "jam/backend.h"
#include "jam/guided_draw.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

// GCC 12's own header sets variables to themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

// For all that follows; what the headers above define is compiled for any CPU.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")

namespace jam {
namespace {

struct Lanes {
  static constexpr int kWidth = 16;
  using Floats = __m512;
  using Mask = __mmask16;
  struct Sum {
    __m512d lower, upper;
  };

  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Floats load(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static float max_of(Floats a) { return _mm512_reduce_max_ps(a); }

  static Mask none() { return 0; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask a) { return a != 0; }
  static Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask legal(const bool* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static Mask not_below_infinity(Floats a) {
    return _mm512_cmp_ps_mask(a, all(kInfinity), _CMP_NLT_UQ);
  }
  static Floats select(Mask mask, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }

  // As in avx2.cpp.
  static Floats weights(Floats logits, Floats max, Floats scale) {
    const Floats exponent = _mm512_mul_ps(_mm512_sub_ps(logits, max), scale);
    const Floats shift = all(0x1.8p23f + kWeightBits);
    const Floats shifted = _mm512_add_ps(exponent, shift);
    const Floats f = _mm512_sub_ps(exponent, _mm512_sub_ps(shifted, shift));
    Floats power = fused(all(kExp2C5), f, all(kExp2C4));
    power = fused(power, f, all(kExp2C3));
    power = fused(power, f, all(kExp2C2));
    power = fused(power, f, all(kExp2C1));
    power = fused(power, f, all(1.0f));
    const __m512i whole = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    power = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), whole));
    const Mask some = _mm512_cmp_ps_mask(exponent, all(kSmallestExponent), _CMP_GT_OQ);
    return _mm512_maskz_roundscale_ps(some, power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats where_above(Floats a, Floats floor) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, floor, _CMP_GT_OQ), a);
  }
  static Sum zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Sum add(Sum sum, Floats a) {
    return {_mm512_add_pd(sum.lower, _mm512_cvtps_pd(_mm512_castps512_ps256(a))),
            _mm512_add_pd(sum.upper, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)))};
  }
  static double sum_of(Sum sum) {
    return _mm512_reduce_add_pd(_mm512_add_pd(sum.lower, sum.upper));
  }
};

#include "cpu/guided_rows.h"

constexpr Backend kBackend{"avx512", sample, probabilities, largest, weights};

}  // namespace
}  // namespace jam

#pragma GCC pop_options

namespace jam {

const Backend* avx512_backend() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? &kBackend : nullptr;
}

}  // namespace jam

#else

namespace jam {
const Backend* avx512_backend() { return nullptr; }
}  // namespace jam

#endif
