// Guided sampling in plain C++: one id at a time, on any CPU.
#include "cpu/lanes.h"

namespace jam {
namespace {

struct Lanes {
  static constexpr const char* kName = "portable";
  static constexpr int kWidth = 1;
  using Floats = float;
  using Ints = uint32_t;
  using Mask = bool;

  template <typename Logit>
  static Floats load(const Logit* from) {
    return to_float(*from);
  }
  static void store(float* to, Floats a) { *to = a; }
  static Floats all(float a) { return a; }
  static Floats fused(Floats a, Floats b, Floats c) { return jam::fused(a, b, c); }
  static Floats rounded(Floats a) { return nearest(a); }
  static Floats beyond(Floats a, Floats nearest) { return a - nearest; }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static float max_of(Floats a) { return a; }
  static Floats where_above(Floats a, Floats floor) { return a > floor ? a : 0.0f; }

  static Ints bits(Floats a) { return bits_of(a); }
  static Floats floats(Ints a) { return float_from_bits(a); }
  static Ints integers(Floats a) { return static_cast<Ints>(nearest(a)); }
  static int64_t sum_of(Ints a) { return a; }

  static Mask none() { return false; }
  static Mask either(Mask a, Mask b) { return a || b; }
  static bool any(Mask a) { return a; }
  static Mask equal(Floats a, Floats b) { return a == b; }
  static Mask legal(const bool* from) { return *from; }
  static Mask not_below_infinity(Floats a) { return !(a < kInfinity); }
  static Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
};

#include "cpu/guided_rows.h"

}  // namespace

const Backend* portable_backend() { return &kBackend; }

}  // namespace jam
