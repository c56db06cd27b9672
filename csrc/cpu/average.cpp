// Weighted averages on the CPU.
#include "jam/average.h"

#include <ATen/ops/empty_like.h>

#include "launchers.h"

namespace jam {
namespace {

JAM_FOR_EACH_CPU void average(const BFloat16* a, const BFloat16* b, BFloat16* out, int64_t size,
                              double share) {
  average_halves(a, b, out, size, static_cast<float>(share), static_cast<float>(1 - share));
}

JAM_FOR_EACH_CPU void average(const Float16* a, const Float16* b, Float16* out, int64_t size,
                              double share) {
  average_halves(a, b, out, size, static_cast<float>(share), static_cast<float>(1 - share));
}

JAM_FOR_EACH_CPU void average(const float* a, const float* b, float* out, int64_t size,
                              double share) {
  average_wholes(a, b, out, size, share, 1 - share);
}

JAM_FOR_EACH_CPU void average(const double* a, const double* b, double* out, int64_t size,
                              double share) {
  average_wholes(a, b, out, size, share, 1 - share);
}

template <typename Value>
void average_of(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, double share) {
  average(static_cast<const Value*>(a.const_data_ptr()),
          static_cast<const Value*>(b.const_data_ptr()),
          static_cast<Value*>(out.mutable_data_ptr()), a.numel(), share);
}

}  // namespace

at::Tensor weighted_average_cpu(const at::Tensor& a, const at::Tensor& b, double share) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(),
                    "weighted_average: a is ", a.scalar_type(), " ", a.sizes(), ", b is ",
                    b.scalar_type(), " ", b.sizes());
  const at::Tensor first = a.contiguous(), second = b.contiguous();
  const at::Tensor out = at::empty_like(first);
  switch (a.scalar_type()) {
    case at::kBFloat16:
      average_of<BFloat16>(first, second, out, share);
      break;
    case at::kHalf:
      average_of<Float16>(first, second, out, share);
      break;
    case at::kFloat:
      average_of<float>(first, second, out, share);
      break;
    case at::kDouble:
      average_of<double>(first, second, out, share);
      break;
    default:
      TORCH_CHECK_VALUE(false, "weighted_average: ", a.scalar_type(), " is no number format here");
  }
  return out;
}

}  // namespace jam
