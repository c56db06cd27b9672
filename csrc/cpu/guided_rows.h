// Guided sampling of one row on the CPU, over `Lanes` of any width.
//
// Included by one file for each instruction set, within its namespace and its compiler pragmas; so
// this header includes nothing. Ids go in blocks: a block's largest weight and its sum say whether
// a search or a sum needs to look into it.

constexpr int64_t kBlock = 128;
static_assert(kBlock % Lanes::kWidth == 0);

template <typename Logit>
class Row {
 public:
  Row(const GuidedRows& rows, int64_t index)
      : row_(rows, index), num_blocks_((row_.num_ids + kBlock - 1) / kBlock), space_(workspace()) {
    space_.reserve(num_blocks_, kBlock);
  }

  const GuidedRow<Logit>& settings() const { return row_; }
  float max() const { return max_; }
  double total() const { return total_; }
  float weight(int64_t id) const { return space_.weights[id]; }

  // Guided logits into the weights' place. Returns 0 or a RowError.
  int64_t find_max() {
    if (row_.error) return row_.error;
    max_ = -kInfinity;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const float largest = find_max_of(block);
      if (!(largest < kInfinity)) return kNotFinite;
      space_.largest[block] = largest;
      if (largest > max_) max_ = largest;
    }
    return max_ == -kInfinity ? static_cast<int64_t>(kNothingLegal) : 0;
  }

  // The first id with the largest logit, after find_max.
  int64_t id_of_max() const {
    int64_t block = 0;
    while (space_.largest[block] != max_) ++block;
    int64_t id = block * kBlock;
    while (space_.weights[id] != max_) ++id;
    return id;
  }

  // Logits to weights relative to `max`. Blocks whose ids all weigh nothing are not written.
  void weigh(float max) {
    total_ = 0;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const bool any = (space_.largest[block] - max) * row_.scale > kSmallestExponent;
      space_.largest[block] = 0.0f;
      space_.sums[block] = any ? weigh_block(block, max) : 0.0;
      total_ += space_.sums[block];
    }
    above_ = space_.sums;
  }

  // The sum of all weights; find_id then draws among them.
  double restart() {
    above_ = space_.sums;
    return total_;
  }

  // The sum of the weights above `floor`; find_id then draws among them.
  double sum_above(float floor) {
    double sum = 0;
    above_ = space_.above;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      above_[block] = space_.largest[block] > floor ? sum_block(block, floor) : 0.0;
      sum += above_[block];
    }
    return sum;
  }

  // The first id at which the running sum of the weights above `floor` exceeds `target`. The sums
  // are those of `floor`, and the caller knows that there is such an id.
  int64_t find_id(float floor, double target) const {
    int64_t block = 0;
    double sum = 0;
    while (sum + above_[block] <= target) sum += above_[block++];
    for (int64_t id = block * kBlock;; ++id) {
      const float weight = space_.weights[id];
      if (weight > floor) sum += weight;
      if (sum > target) return id;
    }
  }

  // The floor above which the ids are that are needed, by falling weight, to reach a quota.
  float floor_of(Quota quota) const {
    Mass passed{0.0, 0};
    uint32_t prefix = 0;
    for (int digit = 0; digit < kNumDigits; ++digit) {
      Mass buckets[kNumBuckets] = {};
      fill(buckets, digit, prefix);
      const int bucket = bucket_of(quota, buckets, buckets_of_digit(digit), passed);
      if (bucket < 0) return 0.0f;  // all weights together do not reach it
      prefix = prefix * buckets_of_digit(digit) + bucket;
    }
    return floor_of_key(prefix);
  }

  void write_weights(float* out) const {
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, row_.num_ids);
      const bool any = space_.largest[block] > 0;
      for (int64_t id = begin; id < end; ++id) out[id] = any ? space_.weights[id] : 0.0f;
    }
  }

  void write_probabilities(float floor, double sum, float* out) const {
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, row_.num_ids);
      const bool any = space_.largest[block] > floor;
      for (int64_t id = begin; id < end; ++id) {
        const float weight = any ? space_.weights[id] : 0.0f;
        out[id] = weight > floor ? static_cast<float>(weight / sum) : 0.0f;
      }
    }
  }

 private:
  GuidedRow<Logit> row_;
  int64_t num_blocks_;
  Workspace& space_;
  double* above_ = nullptr;
  float max_ = 0;
  double total_ = 0;

  // The largest logit of a block, which it writes; +inf or NaN if one is.
  float find_max_of(int64_t block) {
    const int64_t begin = block * kBlock, end = begin + kBlock;
    if (end <= row_.num_ids) {
      // Where no logit is infinite the blend is finite, and where the blend is finite or -inf it is
      // what it should be; what looks wrong is done again with a check of both streams.
      const float quick = row_.uncond ? blend<true, false>(begin) : blend<false, false>(begin);
      if (quick < kInfinity || !row_.uncond) return quick;
      return blend<true, true>(begin);
    }
    float largest = -kInfinity;
    for (int64_t id = begin; id < end; ++id) {
      const float logit = id < row_.num_ids ? row_.logit(id) : -kInfinity;
      if (!(logit < kInfinity)) return kInfinity;
      space_.weights[id] = logit;
      if (logit > largest) largest = logit;
    }
    return largest;
  }

  template <bool kGuided, bool kForbid>
  float blend(int64_t begin) {
    using Floats = typename Lanes::Floats;
    const Floats guidance = Lanes::all(row_.guidance), minus_infinity = Lanes::all(-kInfinity);
    Floats largest = minus_infinity;
    bool right = true;
    auto wrong = Lanes::none();
    for (int64_t id = begin; id < begin + kBlock; id += Lanes::kWidth) {
      Floats logit = Lanes::load(row_.cond + id);
      if constexpr (kGuided) {
        const Floats c = logit, u = Lanes::load(row_.uncond + id);
        logit = Lanes::fused(guidance, Lanes::minus(c, u), u);
        if constexpr (kForbid) {
          logit = Lanes::select(Lanes::equal(c, minus_infinity), minus_infinity, logit);
          logit = Lanes::select(Lanes::equal(u, minus_infinity), minus_infinity, logit);
        }
      }
      if (row_.legal) logit = Lanes::select(Lanes::legal(row_.legal + id), logit, minus_infinity);
      Lanes::store(space_.weights + id, logit);
      largest = Lanes::max(largest, logit);
      wrong = Lanes::either(wrong, Lanes::not_below_infinity(logit));
    }
    right = !Lanes::any(wrong);
    return right ? Lanes::max_of(largest) : kInfinity;
  }

  double weigh_block(int64_t block, float max) {
    using Floats = typename Lanes::Floats;
    const Floats maxima = Lanes::all(max), scale = Lanes::all(row_.scale);
    typename Lanes::Sum sum = Lanes::zero();
    Floats largest = Lanes::all(0.0f);
    float* const weights = space_.weights + block * kBlock;
    for (int64_t id = 0; id < kBlock; id += Lanes::kWidth) {
      const Floats weight = Lanes::weights(Lanes::load(weights + id), maxima, scale);
      Lanes::store(weights + id, weight);
      largest = Lanes::max(largest, weight);
      sum = Lanes::add(sum, weight);
    }
    space_.largest[block] = Lanes::max_of(largest);
    return Lanes::sum_of(sum);
  }

  double sum_block(int64_t block, float floor) const {
    const typename Lanes::Floats floors = Lanes::all(floor);
    typename Lanes::Sum sum = Lanes::zero();
    const float* const weights = space_.weights + block * kBlock;
    for (int64_t id = 0; id < kBlock; id += Lanes::kWidth) {
      const typename Lanes::Floats weight = Lanes::load(weights + id);
      sum = Lanes::add(sum, Lanes::where_above(weight, floors));
    }
    return Lanes::sum_of(sum);
  }

  // Sorts the weights whose upper digits are `prefix` by their next one.
  void fill(Mass* buckets, int digit, uint32_t prefix) const {
    const int shift = shift_of_digit(digit), num = buckets_of_digit(digit);
    for (int64_t block = 0; block < num_blocks_; ++block) {
      if (!(space_.largest[block] > 0)) continue;
      for (int64_t id = block * kBlock; id < (block + 1) * kBlock; ++id) {
        const float weight = space_.weights[id];
        const uint32_t upper = key_of(weight) >> shift;
        if (weight > 0 && upper / num == prefix) {
          Mass& bucket = buckets[upper % num];
          bucket.sum += weight;
          ++bucket.count;
        }
      }
    }
  }
};

template <typename Logit>
void sample_row(const GuidedRows& rows, const GuidedDraws& draws, int64_t index) {
  Row<Logit> row(rows, index);
  write_drawn(draw_of(row, row.find_max(), draws, index), row.settings(), draws, index);
}

template <typename Logit>
int64_t probabilities_of_row(const GuidedRows& rows, float* out, int64_t index) {
  Row<Logit> row(rows, index);
  const GuidedRow<Logit>& settings = row.settings();
  std::fill(out, out + rows.vocabulary, 0.0f);
  if (const int64_t error = row.find_max()) return error;
  out += settings.first_id;
  if (settings.greedy) {
    out[row.id_of_max()] = 1.0f;
    return 0;
  }
  row.weigh(row.max());
  const float floor = floor_of_all(row, before_top_p(row));
  row.write_probabilities(floor, row.sum_above(floor), out);
  return 0;
}

template <typename Logit>
int64_t largest_of_row(const GuidedRows& rows, float* logit, int64_t index) {
  Row<Logit> row(rows, index);
  const int64_t error = row.find_max();
  *logit = error ? -kInfinity : row.max();
  return error ? error : row.settings().first_id + row.id_of_max();
}

template <typename Logit>
int64_t weights_of_row(const GuidedRows& rows, float max, float* out, int64_t index) {
  Row<Logit> row(rows, index);
  std::fill(out, out + rows.vocabulary, 0.0f);
  const int64_t error = row.find_max();
  if (error == kNothingLegal) return 0;  // another shard's ids may be
  if (error) return error;
  row.weigh(max);
  row.write_weights(out + row.settings().first_id);
  return 0;
}

// The table, over the types of logits.
template <typename Function>
auto with_type(LogitType type, const Function& function) {
  switch (type) {
    case LogitType::kBFloat16:
      return function(BFloat16{});
    case LogitType::kFloat16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

void sample(const GuidedRows& rows, const GuidedDraws& draws, int64_t index) {
  with_type(rows.type, [&](auto type) { sample_row<decltype(type)>(rows, draws, index); });
}

int64_t probabilities(const GuidedRows& rows, float* out, int64_t index) {
  return with_type(
      rows.type, [&](auto type) { return probabilities_of_row<decltype(type)>(rows, out, index); });
}

int64_t largest(const GuidedRows& rows, float* logit, int64_t index) {
  return with_type(rows.type,
                   [&](auto type) { return largest_of_row<decltype(type)>(rows, logit, index); });
}

int64_t weights(const GuidedRows& rows, float max, float* out, int64_t index) {
  return with_type(
      rows.type, [&](auto type) { return weights_of_row<decltype(type)>(rows, max, out, index); });
}
