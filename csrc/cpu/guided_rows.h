// Guided sampling of one row on the CPU, over `Lanes` of any width.
//
// Included by one file for each instruction set, within its namespace and its compiler pragmas; so
// this header includes nothing. Ids go in blocks: a block's sum and a bound of its weights say
// whether a search needs to look into it, and only then are its weights written. So logits are read
// twice, for the largest and for the sums, and little else is.

constexpr int64_t kBlock = 128;
static_assert(kBlock % Lanes::kWidth == 0);

using Floats = Lanes::Floats;

// As weight_of, before it is rounded to an integer. Adding and subtracting 1.5 2^23 rounds an
// exponent to the nearest integer, the even one of two, and leaves it in the last bits, from where
// it goes into the power's exponent. A NaN comes out as nothing, too.
inline Floats powers_of(Floats logits, Floats max, Floats scale) {
  const Floats exponent = Lanes::max((logits - max) * scale, Lanes::all(kSmallestExponent));
  const Floats shift = Lanes::all(0x1.8p23f + kWeightBits), shifted = exponent + shift;
  const Floats f = Lanes::beyond(exponent, shifted - shift);
  Floats power = Lanes::fused(Lanes::all(kExp2C5), f, Lanes::all(kExp2C4));
  power = Lanes::fused(power, f, Lanes::all(kExp2C3));
  power = Lanes::fused(power, f, Lanes::all(kExp2C2));
  power = Lanes::fused(power, f, Lanes::all(kExp2C1));
  power = Lanes::fused(power, f, Lanes::all(1.0f));
  return Lanes::floats(Lanes::bits(power) + (Lanes::bits(shifted) << 23));
}

// The exact sum of a block's weights, rounded on the way: each is cut into a multiple of 2^15 and
// a rest, which two shifts leave as integers in the last bits.
class BlockSum {
 public:
  void add(Floats weights) {
    const Floats high = Lanes::all(kHigh), shifted = weights + high;
    const Floats rest = weights - (shifted - high);
    high_ += Lanes::bits(shifted);
    low_ += Lanes::bits(rest + Lanes::all(kLow));
  }

  int64_t value() const {
    const uint32_t high = Lanes::sum_of(high_) - kBlock * std::bit_cast<uint32_t>(kHigh);
    const uint32_t low = Lanes::sum_of(low_) - kBlock * std::bit_cast<uint32_t>(kLow);
    return (int64_t{high} << 15) + static_cast<int32_t>(low);
  }

 private:
  static constexpr float kHigh = 0x1.8p38f, kLow = 0x1.8p23f;
  static_assert(kBlock << (kWeightBits - 15) < int64_t{1} << 32);
  Lanes::Ints high_{}, low_{};
};

// The same with less work, where each weight is below `kLimit`.
class SmallSum {
 public:
  static constexpr float kLimit = 0x1p32f * Lanes::kWidth / kBlock;
  static_assert(kLimit <= 0x1p31f);
  void add(Floats weights) { sums_ += Lanes::integers(weights); }
  int64_t value() const { return Lanes::sum_of(sums_); }

 private:
  Lanes::Ints sums_{};
};

template <typename Logit>
class Row {
 public:
  Row(const GuidedRows& rows, int64_t index)
      : row_(rows, index), num_blocks_((row_.num_ids + kBlock - 1) / kBlock), space_(workspace()) {
    space_.reserve(num_blocks_, kBlock);
  }

  const GuidedRow<Logit>& settings() const { return row_; }
  float max() const { return max_; }
  double total() const { return static_cast<double>(total_); }

  // Of an id that find_id yielded.
  float weight(int64_t id) const { return space_.weights[id]; }

  // Returns 0 or a RowError.
  int64_t find_max() {
    if (row_.error) return row_.error;
    max_ = -kInfinity;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      space_.states[block] = 0;
      if ((block + 1) * kBlock > row_.num_ids) write_logits(block);
      float largest = largest_of(block);
      // Where no logit is infinite the blend is finite, and where the blend is finite or -inf it is
      // what it should be; what looks wrong is done again with a check of both streams.
      if (!(largest < kInfinity) && row_.uncond) {
        space_.states[block] |= kForbids;
        largest = largest_of(block);
      }
      if (!(largest < kInfinity)) return kNotFinite;
      space_.bounds[block] = largest;
      if (largest > max_) max_ = largest;
    }
    return max_ == -kInfinity ? static_cast<int64_t>(kNothingLegal) : 0;
  }

  // The first id with the largest logit, after find_max.
  int64_t id_of_max() const {
    int64_t block = 0;
    while (space_.bounds[block] != max_) ++block;
    int64_t id = block * kBlock;
    while (row_.logit(id) != max_) ++id;
    return id;
  }

  // The sums of weights relative to `max`.
  void weigh(float max) {
    max_ = max;
    const Floats maxima = Lanes::all(max), scale = Lanes::all(row_.scale);
    // Weights rise with logits but for the error of the polynomial, 2^-22, and their rounding.
    for (int64_t block = 0; block < num_blocks_; block += Lanes::kWidth) {
      const Floats powers = powers_of(Lanes::load(space_.bounds + block), maxima, scale);
      Lanes::store(space_.bounds + block,
                   Lanes::fused(powers, Lanes::all(1 + 0x1p-18f), Lanes::all(0.5f)));
    }
    total_ = 0;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      space_.sums[block] = has_above(block, 0.0f) ? sum_of_all(block) : 0;
      total_ += space_.sums[block];
    }
    above_ = space_.sums;
  }

  // The sum of all weights; find_id then draws among them.
  double restart() {
    above_ = space_.sums;
    return total();
  }

  // The sum of the weights above `floor`; find_id then draws among them. Less than `limit` need not
  // be exact: blocks are looked into until what they can hold together is less.
  double sum_above(float floor, double limit = 0) {
    int64_t sum = 0;
    above_ = space_.above;
    for (int64_t block = 0; block < num_blocks_; ++block) {
      above_[block] = has_above(block, floor) ? space_.sums[block] : 0;
      sum += above_[block];
    }
    for (int64_t block = 0; block < num_blocks_ && sum >= limit; ++block) {
      if (!above_[block]) continue;
      sum -= above_[block];
      above_[block] = sum_of_those(block, floor);
      sum += above_[block];
    }
    return static_cast<double>(sum);
  }

  // The first id at which the running sum of the weights above `floor` exceeds `target`. The sums
  // are those of `floor`, and the caller knows that there is such an id.
  int64_t find_id(float floor, double target) {
    const int64_t whole = static_cast<int64_t>(target);  // sums are integers
    int64_t block = 0, sum = 0;
    while (sum + above_[block] <= whole) sum += above_[block++];
    const float* const weights = weights_of(block);
    for (int64_t i = 0;; ++i) {
      if (weights[i] > floor) sum += static_cast<int64_t>(weights[i]);
      if (sum > whole) return block * kBlock + i;
    }
  }

  // The floor above which the ids are that are needed, by falling weight, to reach a quota.
  float floor_of(Quota quota) {
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

  // Calls write(id, weight) for all ids, in their order.
  template <typename Write>
  void for_each_weight(const Write& write) {
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, row_.num_ids);
      const float* const weights = has_above(block, 0.0f) ? weights_of(block) : nullptr;
      for (int64_t id = begin; id < end; ++id) write(id, weights ? weights[id - begin] : 0.0f);
    }
  }

 private:
  // What is known of a block, as bits.
  enum State : uint8_t {
    kForbids = 1,  // a stream has -inf
    kLogits = 2,   // its guided logits are in the weights' place, padded with -inf
    kWeights = 4   // its weights are there
  };
  enum class Blend { kCond, kGuided, kGuarded };

  GuidedRow<Logit> row_;
  int64_t num_blocks_;
  Workspace& space_;
  int64_t* above_ = nullptr;
  float max_ = 0;
  int64_t total_ = 0;

  // Whether a block may have weights above a floor; weights are integers.
  bool has_above(int64_t block, float floor) const {
    return space_.bounds[block] > std::max(floor, 0.75f);
  }

  // The last block, if it is short.
  void write_logits(int64_t block) {
    for (int64_t id = block * kBlock; id < (block + 1) * kBlock; ++id) {
      space_.weights[id] = id < row_.num_ids ? row_.logit(id) : -kInfinity;
    }
    space_.states[block] = kLogits;
  }

  template <Blend kBlend>
  Floats logits(int64_t id) const {
    const Floats c = Lanes::load(row_.cond + id), minus_infinity = Lanes::all(-kInfinity);
    if constexpr (kBlend == Blend::kCond) return c;
    Floats logit = c;
    if (kBlend == Blend::kGuided || row_.uncond) {
      const Floats u = Lanes::load(row_.uncond + id);
      logit = Lanes::fused(Lanes::all(row_.guidance), c - u, u);
      if constexpr (kBlend == Blend::kGuided) return logit;
      logit = Lanes::select(Lanes::equal(c, minus_infinity), minus_infinity, logit);
      logit = Lanes::select(Lanes::equal(u, minus_infinity), minus_infinity, logit);
    }
    if (row_.legal) logit = Lanes::select(Lanes::legal(row_.legal + id), logit, minus_infinity);
    return logit;
  }

  // Calls use(i, logits) for a block's vectors; i counts ids from its first.
  template <typename Use>
  void each(int64_t block, const Use& use) const {
    const int64_t begin = block * kBlock;
    if (space_.states[block] & kLogits) {
      for (int64_t i = 0; i < kBlock; i += Lanes::kWidth) {
        use(i, Lanes::load(space_.weights + begin + i));
      }
    } else if (row_.legal || space_.states[block] & kForbids) {
      for (int64_t i = 0; i < kBlock; i += Lanes::kWidth) {
        use(i, logits<Blend::kGuarded>(begin + i));
      }
    } else if (row_.uncond) {
      for (int64_t i = 0; i < kBlock; i += Lanes::kWidth) {
        use(i, logits<Blend::kGuided>(begin + i));
      }
    } else {
      for (int64_t i = 0; i < kBlock; i += Lanes::kWidth) {
        use(i, logits<Blend::kCond>(begin + i));
      }
    }
  }

  // The largest logit; +inf if one is +inf or NaN.
  float largest_of(int64_t block) const {
    Floats largest = Lanes::all(-kInfinity);
    Lanes::Mask wrong = Lanes::none();
    each(block, [&](int64_t, Floats logits) JAM_INLINE {
      largest = Lanes::max(largest, logits);
      wrong = Lanes::either(wrong, Lanes::not_below_infinity(logits));
    });
    return Lanes::any(wrong) ? kInfinity : Lanes::max_of(largest);
  }

  Floats powers(Floats logits) const {
    return powers_of(logits, Lanes::all(max_), Lanes::all(row_.scale));
  }

  int64_t sum_of_all(int64_t block) const {
    return space_.bounds[block] < SmallSum::kLimit ? sum_by<SmallSum>(block)
                                                   : sum_by<BlockSum>(block);
  }

  template <typename Sum>
  int64_t sum_by(int64_t block) const {
    Sum sum;
    each(block, [&](int64_t, Floats logits) JAM_INLINE { sum.add(powers(logits)); });
    return sum.value();
  }

  // A block's weights, which are computed when they are first asked for.
  const float* weights_of(int64_t block) {
    float* const weights = space_.weights + block * kBlock;
    if (!(space_.states[block] & kWeights)) {
      each(block, [&](int64_t i, Floats logits)
                      JAM_INLINE { Lanes::store(weights + i, Lanes::rounded(powers(logits))); });
      space_.states[block] |= kWeights;
    }
    return weights;
  }

  int64_t sum_of_those(int64_t block, float floor) {
    const float* const weights = weights_of(block);
    BlockSum sum;
    for (int64_t i = 0; i < kBlock; i += Lanes::kWidth) {
      sum.add(Lanes::where_above(Lanes::load(weights + i), Lanes::all(floor)));
    }
    return sum.value();
  }

  // Sorts the weights whose upper digits are `prefix` by their next one.
  void fill(Mass* buckets, int digit, uint32_t prefix) {
    const int shift = shift_of_digit(digit), num = buckets_of_digit(digit);
    const float below = digit ? floor_of_key(prefix * num << shift) : 0.0f;  // all of them
    for (int64_t block = 0; block < num_blocks_; ++block) {
      if (!has_above(block, below)) continue;
      const float* const weights = weights_of(block);
      for (int64_t i = 0; i < kBlock; ++i) {
        const uint32_t upper = key_of(weights[i]) >> shift;
        if (weights[i] > 0 && upper / num == prefix) {
          Mass& bucket = buckets[upper % num];
          bucket.sum += weights[i];
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
  const double sum = row.sum_above(floor);
  row.for_each_weight([&](int64_t id, float weight) {
    if (weight > floor) out[id] = static_cast<float>(weight / sum);
  });
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
  out += row.settings().first_id;
  row.for_each_weight([&](int64_t id, float weight) { out[id] = weight; });
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

constexpr Backend kBackend{Lanes::kName, sample, probabilities, largest, weights};
