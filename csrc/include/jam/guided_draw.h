// A draw from one row, for every backend: by `Row`, which knows the row's weights and how to sum
// and search them. On a GPU all threads of a block run this together.
//
// A Row has: settings() -> GuidedRow, max() -> the largest logit, id_of_max(), weigh(max),
// weight(id), total() -> the sum of all weights; sum_above(floor, limit) -> the sum of the weights
// above the floor, or, if that is less than the limit, anything less; sum_above(floor) -> the sum,
// or restart() for all of them, and then find_id(floor, target) -> the first id at which the
// running sum of the weights above that floor exceeds the target; floor_of(quota) -> the floor of
// the weights that reach it.
#pragma once

#include <cmath>
#include <cstdint>

#include "jam/guided_sampling.h"
#include "jam/host_device.h"

namespace jam {

// What top-k and min-p leave: the weights above `floor`. Of them top-p keeps those whose larger
// ones sum to less than `nucleus`.
struct BeforeTopP {
  float floor;
  double nucleus;
};

template <typename Row>
JAM_DEVICE BeforeTopP before_top_p(Row& row) {
  const auto& settings = row.settings();
  if (settings.top_k >= settings.num_ids) return {settings.floor, settings.top_p * row.total()};
  const float floor = row.floor_of({static_cast<double>(kInfinity), settings.top_k});
  const double nucleus = settings.top_p * row.sum_above(floor);
  return {floor > settings.floor ? floor : settings.floor, nucleus};
}

// The floor of all three filters.
template <typename Row>
JAM_DEVICE float floor_of_all(Row& row, BeforeTopP before) {
  if (row.settings().top_p == 1) return before.floor;
  const float floor = row.floor_of({before.nucleus, kMaxVocabulary + 1});
  return floor > before.floor ? floor : before.floor;
}

struct Drawn {
  int64_t id;  // counted from the row's first legal one; or a RowError
  float log_probability, truncated_log_probability;
};

// Draws, after the search for the largest logit, which yielded 0 or an `error`.
template <typename Row>
JAM_DEVICE Drawn draw_of(Row& row, int64_t error, const GuidedDraws& draws, int64_t index) {
  if (error) return {error, 0.0f, 0.0f};
  if (row.settings().greedy) return {row.id_of_max(), 0.0f, 0.0f};
  row.weigh(row.max());
  const BeforeTopP before = before_top_p(row);
  float floor = before.floor;
  double sum = floor > 0 ? row.sum_above(floor) : row.restart();
  int64_t id;
  for (uint32_t round = 0;; ++round) {
    id = row.find_id(floor, uniform_of(draws, index, round) * sum);
    if (row.settings().top_p == 1) break;  // nothing to test
    floor = row.weight(id);
    sum = row.sum_above(floor, before.nucleus);
    if (sum < before.nucleus) break;
  }
  const double weight = row.weight(id);
  Drawn drawn{id, static_cast<float>(std::log(weight / row.total())), 0.0f};
  if (draws.truncated_log_probability) {
    const double left = row.sum_above(floor_of_all(row, before));
    drawn.truncated_log_probability = static_cast<float>(std::log(weight / left));
  }
  return drawn;
}

template <typename Settings>
JAM_DEVICE void write_drawn(Drawn drawn, const Settings& settings, const GuidedDraws& draws,
                            int64_t index) {
  draws.tokens[index] = drawn.id < 0 ? drawn.id : settings.first_id + drawn.id;
  draws.log_probability[index] = drawn.log_probability;
  if (draws.truncated_log_probability) {
    draws.truncated_log_probability[index] = drawn.truncated_log_probability;
  }
}

}  // namespace jam
