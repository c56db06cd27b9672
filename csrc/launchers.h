// The launchers that bindings.cpp registers: one per operation and device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace pybind11 {
class module_;
}

namespace jam {

at::Tensor guided_sample_cpu(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                             const at::Tensor& guidance_scale, const at::Tensor& temperature,
                             const at::Tensor& top_p, const std::optional<at::Tensor>& legal,
                             const at::Tensor& seed, const at::Tensor& offset);

at::Tensor guided_sample_cuda(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                              const at::Tensor& guidance_scale, const at::Tensor& temperature,
                              const at::Tensor& top_p, const std::optional<at::Tensor>& legal,
                              const at::Tensor& seed, const at::Tensor& offset);

// Functions on numpy arrays of the extension module.
void bind_cm3(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
at::Tensor weighted_average_cpu(const at::Tensor& a, const at::Tensor& b, double share);

}  // namespace jam
