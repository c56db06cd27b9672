// Weighted averages on the CPU.
#include "jam/average.h"

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

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
void average_rows(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, double share) {
  const auto* first = static_cast<const Value*>(a.const_data_ptr());
  const auto* second = static_cast<const Value*>(b.const_data_ptr());
  auto* result = static_cast<Value*>(out.mutable_data_ptr());
  if (out.is_contiguous()) return average(first, second, result, a.numel(), share);
  const int64_t columns = out.size(1);
  for (int64_t row = 0; row < out.size(0); ++row)
    average(first + row * columns, second + row * columns, result + row * out.stride(0), columns,
            share);
}

void weighted_average(const at::Tensor& a, const at::Tensor& b, double share,
                      const at::Tensor& out) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(),
                    "weighted_average: a is ", a.scalar_type(), " ", a.sizes(), ", b is ",
                    b.scalar_type(), " ", b.sizes());
  TORCH_CHECK_VALUE(a.sizes() == out.sizes() && a.scalar_type() == out.scalar_type(),
                    "weighted_average: a is ", a.scalar_type(), " ", a.sizes(), ", out is ",
                    out.scalar_type(), " ", out.sizes());
  TORCH_CHECK_VALUE(out.is_contiguous() || (out.dim() == 2 && out.stride(1) == 1),
                    "weighted_average: out is neither contiguous nor a matrix of whole rows");
  const at::Tensor first = a.contiguous(), second = b.contiguous();
  switch (a.scalar_type()) {
    case at::kBFloat16:
      return average_rows<BFloat16>(first, second, out, share);
    case at::kHalf:
      return average_rows<Float16>(first, second, out, share);
    case at::kFloat:
      return average_rows<float>(first, second, out, share);
    case at::kDouble:
      return average_rows<double>(first, second, out, share);
    default:
      TORCH_CHECK_VALUE(false, "weighted_average: ", a.scalar_type(), " is no number format here");
  }
}

// torch's exceptions as Python's.
PyObject* call(const at::Tensor& a, const at::Tensor& b, double share, const at::Tensor& out) {
  HANDLE_TH_ERRORS {
    const pybind11::gil_scoped_release unlocked;
    weighted_average(a, b, share, out);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace

void bind_average(pybind11::module_& module) {
  module.def("weighted_average",
             [](const at::Tensor& a, const at::Tensor& b, double share, const at::Tensor& out) {
               PyObject* none = call(a, b, share, out);
               if (!none) throw pybind11::error_already_set();
               return pybind11::reinterpret_steal<pybind11::object>(none);
             });
}

}  // namespace jam
