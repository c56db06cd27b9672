// Guided sampling with AVX-512: sixteen ids at a time.
#include "cpu/lanes.h"

#ifdef JAM_HAS_X86_LANES

// For all that follows; what the headers above define is compiled for any CPU.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")

namespace jam {
namespace {

struct Lanes {
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  using Floats = __m512;
  typedef uint32_t Ints __attribute__((vector_size(64)));
  using Mask = __mmask16;

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
  static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats rounded(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Floats beyond(Floats a, Floats) { return _mm512_reduce_ps(a, 0); }  // 0: nearest
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static float max_of(Floats a) { return _mm512_reduce_max_ps(a); }
  static Floats where_above(Floats a, Floats floor) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, floor, _CMP_GT_OQ), a);
  }

  static Ints bits(Floats a) { return reinterpret_cast<Ints>(a); }
  static Floats floats(Ints a) { return reinterpret_cast<Floats>(a); }
  static Ints integers(Floats a) { return reinterpret_cast<Ints>(_mm512_cvtps_epi32(a)); }
  static int64_t sum_of(Ints a) {
    const __m512i all = reinterpret_cast<__m512i>(a), odd = _mm512_srli_epi64(all, 32);
    const __m512i even = _mm512_and_si512(all, _mm512_set1_epi64(0xFFFFFFFF));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(odd, even));
  }

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
};

#include "cpu/guided_rows.h"

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

const jam::Backend* jam::avx512_backend() { return nullptr; }

#endif
