// Guided sampling with AVX2, FMA and F16C: eight ids at a time.
#include "cpu/lanes.h"

#ifdef JAM_HAS_X86_LANES

// For all that follows; what the headers above define is compiled for any CPU.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace jam {
namespace {

struct Lanes {
  static constexpr const char* kName = "avx2";
  static constexpr int kWidth = 8;
  using Floats = __m256;
  typedef uint32_t Ints __attribute__((vector_size(32)));
  using Mask = __m256;

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
  static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats rounded(Floats a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats beyond(Floats a, Floats nearest) { return a - nearest; }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static float max_of(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static Floats where_above(Floats a, Floats floor) {
    return _mm256_and_ps(a, _mm256_cmp_ps(a, floor, _CMP_GT_OQ));
  }

  static Ints bits(Floats a) { return reinterpret_cast<Ints>(a); }
  static Floats floats(Ints a) { return reinterpret_cast<Floats>(a); }
  static Ints integers(Floats a) { return reinterpret_cast<Ints>(_mm256_cvtps_epi32(a)); }
  static int64_t sum_of(Ints a) {
    const __m256i all = reinterpret_cast<__m256i>(a), odd = _mm256_srli_epi64(all, 32);
    const __m256i even = _mm256_and_si256(all, _mm256_set1_epi64x(0xFFFFFFFF));
    const __m256i sums = _mm256_add_epi64(odd, even);
    const __m128i half =
        _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
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
};

#include "cpu/guided_rows.h"

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

const jam::Backend* jam::avx2_backend() { return nullptr; }

#endif
