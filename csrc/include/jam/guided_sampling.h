// Guided sampling: classifier-free guidance, temperature and top-p in one draw per row.
//
// The algorithm on raw pointers, for host and device; megatron_jam/ops/reference.py is its
// specification. Every number is defined to the bit, so that all backends draw the same token:
// float operations are rounded one by one or fused where written, and weights are integers whose
// float64 sums are exact in any order up to kMaxVocabulary ids.
//
// A draw is by rejection: draw among the weights above a floor; the token is in the nucleus if the
// mass of strictly larger weights is below top_p; if not, its weight is the new floor, as whatever
// is not larger is outside of the nucleus too. No sort, and 1/top_p rounds or fewer on average.
#pragma once

#include <cmath>
#include <cstdint>

#include "jam/host_device.h"
#include "jam/logits.h"
#include "jam/philox.h"

namespace jam {

constexpr int64_t kMaxVocabulary = int64_t{1} << 17;
constexpr float kMinusInfinity = -HUGE_VALF;

// What a row yields in place of a token id.
enum RowError : int64_t { kNotFinite = -1, kNothingLegal = -2, kWrongSetting = -3 };

// All pointers are on the device of the op; strides count elements. Settings have one value a row.
struct GuidedSampling {
  LogitType type;
  int64_t num_rows, vocabulary;
  const void *cond, *uncond;  // [num_rows, vocabulary]; uncond may be null: no guidance
  int64_t cond_stride, uncond_stride, legal_stride;
  const bool* legal;  // [num_rows, vocabulary], or null: every id
  const double *guidance_scale, *temperature, *top_p;
  const int64_t *seed, *offset;
  int64_t* tokens;  // out: the id drawn, or a RowError
};

// fp32 arithmetic that no compiler flag may contract or reorder.
#ifdef __CUDA_ARCH__
JAM_HOST_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
JAM_HOST_DEVICE float nearest(float a) { return rintf(a); }
#else
JAM_HOST_DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
JAM_HOST_DEVICE float nearest(float a) { return std::nearbyint(a); }
#endif

// One row, with its settings in the form that the arithmetic uses.
template <typename Logit>
struct GuidedRow {
  const Logit *cond, *uncond;
  const bool* legal;
  int64_t vocabulary;
  float guidance;
  float scale;  // log2(e) / temperature
  double top_p;
  int64_t seed, offset;
  bool greedy, valid;

  JAM_HOST_DEVICE GuidedRow(const GuidedSampling& op, int64_t row)
      : cond(static_cast<const Logit*>(op.cond) + row * op.cond_stride),
        uncond(op.uncond ? static_cast<const Logit*>(op.uncond) + row * op.uncond_stride : nullptr),
        legal(op.legal ? op.legal + row * op.legal_stride : nullptr),
        vocabulary(op.vocabulary),
        guidance(static_cast<float>(op.guidance_scale[row])),
        top_p(op.top_p[row]),
        seed(op.seed[row]),
        offset(op.offset[row]) {
    constexpr double kLog2E = 1.4426950408889634, kLargest = 0x1p127;
    const double temperature = op.temperature[row], inverse = kLog2E / temperature;
    greedy = temperature == 0;
    scale = static_cast<float>(inverse < kLargest ? inverse : kLargest);
    // Written so that a NaN is not valid.
    valid = temperature >= 0 && temperature <= kLargest && top_p > 0 && top_p <= 1 &&
            guidance >= -kLargest && guidance <= kLargest;
  }

  // The guided logit of an id, u + guidance * (c - u); -inf if the id is not legal or if one of
  // the two streams forbids it with -inf.
  JAM_HOST_DEVICE float logit(int64_t id) const {
    if (legal && !legal[id]) return kMinusInfinity;
    const float c = to_float(cond[id]);
    if (!uncond) return c;
    const float u = to_float(uncond[id]);
    if (c == kMinusInfinity || u == kMinusInfinity) return kMinusInfinity;
    return fused(guidance, c - u, u);
  }

  // The weight of an id: 2^36 exp((logit - max) / temperature), rounded to an integer.
  JAM_HOST_DEVICE float weight(int64_t id, float max) const {
    const float exponent = (logit(id) - max) * scale;
    if (!(exponent > -40.0f)) return 0.0f;  // below a half; also what keeps -inf out
    const float whole = nearest(exponent), f = exponent - whole;
    // 2^f for |f| <= 1/2, to 1.1e-7 relative; exactly 1 at f = 0.
    float power = 0x1.5bba14p-10f;
    power = fused(power, f, 0x1.3cea88p-7f);
    power = fused(power, f, 0x1.c6b752p-5f);
    power = fused(power, f, 0x1.ebf9bcp-3f);
    power = fused(power, f, 0x1.62e42ap-1f);
    power = fused(power, f, 1.0f);
    const uint32_t biased = static_cast<uint32_t>(static_cast<int32_t>(whole) + 36 + 127);
    return nearest(power * float_from_bits(biased << 23));
  }
};

struct Largest {
  float logit;
  int64_t id;  // or a RowError
};

// The largest logit of the ids in [begin, end), by the lower id where two are equal; a RowError if
// there is none, or if a logit is NaN or +inf.
template <typename Logit>
JAM_HOST_DEVICE Largest largest_logit(const GuidedRow<Logit>& row, int64_t begin, int64_t end) {
  Largest best{kMinusInfinity, kNothingLegal};
  for (int64_t id = begin; id < end; ++id) {
    const float logit = row.logit(id);
    if (!(logit < HUGE_VALF)) return {logit, kNotFinite};
    if (logit > best.logit) best = {logit, id};
  }
  return best;
}

// The sum of the weights above `floor` of the ids in [begin, end).
template <typename Logit>
JAM_HOST_DEVICE double mass_above(const GuidedRow<Logit>& row, float max, float floor,
                                  int64_t begin, int64_t end) {
  double mass = 0;
  for (int64_t id = begin; id < end; ++id) {
    const float weight = row.weight(id, max);
    if (weight > floor) mass += weight;
  }
  return mass;
}

// The first id in [begin, end) at which the running sum of the weights above `floor`, starting from
// `sum`, exceeds `target`. The caller knows that there is one.
template <typename Logit>
JAM_HOST_DEVICE int64_t find_id(const GuidedRow<Logit>& row, float max, float floor, double sum,
                                double target, int64_t begin, int64_t end) {
  for (int64_t id = begin; id < end; ++id) {
    const float weight = row.weight(id, max);
    if (weight > floor) sum += weight;
    if (sum > target) return id;
  }
  return end - 1;
}

}  // namespace jam
