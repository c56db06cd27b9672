// Guided sampling in plain C++: one id at a time, on any CPU.
#include <algorithm>
#include <cmath>

#include "cpu/workspace.h"
#include "jam/backend.h"
#include "jam/guided_draw.h"

namespace jam {
namespace {

struct Lanes {
  static constexpr int kWidth = 1;
  using Floats = float;
  using Mask = bool;
  using Sum = double;

  template <typename Logit>
  static Floats load(const Logit* from) {
    return to_float(*from);
  }
  static void store(float* to, Floats a) { *to = a; }
  static Floats all(float a) { return a; }
  static Floats minus(Floats a, Floats b) { return a - b; }
  static Floats fused(Floats a, Floats b, Floats c) { return jam::fused(a, b, c); }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static float max_of(Floats a) { return a; }

  static Mask none() { return false; }
  static Mask either(Mask a, Mask b) { return a || b; }
  static bool any(Mask a) { return a; }
  static Mask equal(Floats a, Floats b) { return a == b; }
  static Mask legal(const bool* from) { return *from; }
  static Mask not_below_infinity(Floats a) { return !(a < kInfinity); }
  static Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }

  static Floats weights(Floats logits, Floats max, Floats scale) {
    return weight_of(logits, max, scale);
  }
  static Floats where_above(Floats a, Floats floor) { return a > floor ? a : 0.0f; }
  static Sum zero() { return 0.0; }
  static Sum add(Sum sum, Floats a) { return sum + a; }
  static double sum_of(Sum sum) { return sum; }
};

#include "cpu/guided_rows.h"

constexpr Backend kBackend{"portable", sample, probabilities, largest, weights};

}  // namespace

const Backend* portable_backend() { return &kBackend; }

}  // namespace jam
