// Guided sampling: classifier-free guidance, temperature, top-k, top-p and min-p in one draw a row.
//
// What all backends share, on raw pointers; megatron_jam/ops/reference.py is the specification.
// Filters keep the ids whose weight is above a floor, so ties stay together:
// - top-k: fewer than k weights are strictly larger;
// - top-p: the strictly larger weights sum to less than top_p of what top-k kept;
// - min-p: the weight is at least min_p of the largest.
// A draw is by rejection: draw among the weights above a floor; the id is in the nucleus if the
// strictly larger weights sum to less than top_p; if not, its weight is the new floor, as whatever
// is not larger is outside of the nucleus too. No sort, and 1/top_p rounds or fewer on average.
#pragma once

#include <cstdint>

#include "jam/host_device.h"
#include "jam/logits.h"
#include "jam/philox.h"
#include "jam/weights.h"

namespace jam {

// What a row yields in place of a token id.
enum RowError : int64_t {
  kNotFinite = -1,
  kNothingLegal = -2,
  kWrongSetting = -3,
  kWrongRange = -4
};

// In the order of a row of GuidedRows::row_settings.
struct GuidedSettings {
  double guidance_scale, temperature, top_p, top_k, min_p;
};

// The rows. Pointers are on the device of the op; strides count elements.
struct GuidedRows {
  LogitType type;
  int64_t num_rows, vocabulary;
  const void *cond, *uncond;  // [num_rows, vocabulary]; uncond may be null: no guidance
  int64_t cond_stride, uncond_stride;
  int64_t legal_begin, legal_end;  // the legal ids of every row
  const int64_t* legal_ranges;     // [num_rows, 2], in place of these two; or null
  const bool* legal;               // [num_rows, vocabulary]: which of them; or null: all
  int64_t legal_stride;
  GuidedSettings settings;             // of every row
  const GuidedSettings* row_settings;  // [num_rows], in place of it; or null
};

// A draw for each row.
struct GuidedDraws {
  int64_t seed, offset;    // of every row
  const int64_t* numbers;  // [num_rows, 2]: (seed, offset), in place of these two; or null
  int64_t* tokens;         // out [num_rows]: the id drawn, or a RowError
  float* log_probability;  // out [num_rows]: before top-k, top-p and min-p
  float* truncated_log_probability;  // out [num_rows]: behind them; or null
};

// One row, with its settings in the form that the arithmetic uses. Ids count from the first legal.
template <typename Logit>
struct GuidedRow {
  const Logit *cond, *uncond;
  const bool* legal;
  int64_t first_id, num_ids;
  float guidance;
  float scale;  // log2(e) / temperature
  double top_p;
  int64_t top_k;
  float floor;  // of min-p
  bool greedy;
  int64_t error;  // 0 or a RowError

  JAM_HOST_DEVICE GuidedRow(const GuidedRows& rows, int64_t row) {
    const GuidedSettings settings = rows.row_settings ? rows.row_settings[row] : rows.settings;
    first_id = rows.legal_ranges ? rows.legal_ranges[2 * row] : rows.legal_begin;
    const int64_t end = rows.legal_ranges ? rows.legal_ranges[2 * row + 1] : rows.legal_end;
    error = check(settings);
    if (first_id < 0 || end > rows.vocabulary || first_id > end) error = kWrongRange;
    num_ids = error ? 0 : end - first_id;
    if (error) first_id = 0;
    cond = static_cast<const Logit*>(rows.cond) + row * rows.cond_stride + first_id;
    uncond = static_cast<const Logit*>(rows.uncond);
    if (uncond) uncond += row * rows.uncond_stride + first_id;
    legal = rows.legal ? rows.legal + row * rows.legal_stride + first_id : nullptr;

    constexpr double kLog2E = 1.4426950408889634;
    const double inverse = kLog2E / settings.temperature;
    guidance = static_cast<float>(settings.guidance_scale);
    scale = static_cast<float>(inverse < kLargest ? inverse : kLargest);
    greedy = settings.temperature == 0;
    top_p = settings.top_p;
    top_k = error || settings.top_k == 0 || settings.top_k > kMaxVocabulary
                ? kMaxVocabulary
                : static_cast<int64_t>(settings.top_k);
    floor = error ? 0.0f : min_p_floor(settings.min_p);
  }

  // The guided logit of an id, u + guidance (c - u); -inf if the id is not legal or if one of the
  // two streams forbids it with -inf.
  JAM_HOST_DEVICE float logit(int64_t id) const {
    if (legal && !legal[id]) return -kInfinity;
    const float c = to_float(cond[id]);
    if (!uncond) return c;
    const float u = to_float(uncond[id]);
    if (c == -kInfinity || u == -kInfinity) return -kInfinity;
    return fused(guidance, c - u, u);
  }

 private:
  static constexpr double kLargest = 0x1p127;

  // Written so that a NaN is wrong.
  JAM_HOST_DEVICE static int64_t check(const GuidedSettings& s) {
    const bool right = s.guidance_scale >= -kLargest && s.guidance_scale <= kLargest &&
                       s.temperature >= 0 && s.temperature <= kLargest && s.top_p > 0 &&
                       s.top_p <= 1 && s.min_p >= 0 && s.min_p <= 1 && s.top_k >= 0 &&
                       s.top_k <= 0x1p53 &&
                       s.top_k == static_cast<double>(static_cast<int64_t>(s.top_k));
    return right ? 0 : static_cast<int64_t>(kWrongSetting);
  }
};

// A number in [0, 1) for a round of a row's draw.
JAM_HOST_DEVICE double uniform_of(const GuidedDraws& draws, int64_t row, uint32_t round) {
  const int64_t seed = draws.numbers ? draws.numbers[2 * row] : draws.seed;
  const int64_t offset = draws.numbers ? draws.numbers[2 * row + 1] : draws.offset;
  return philox_uniform(seed, offset, round);
}

}  // namespace jam
