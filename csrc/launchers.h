// The operators that bindings.cpp registers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace pybind11 {
class module_;
}

namespace jam {

using OptionalTensor = std::optional<at::Tensor>;

// Guided sampling, for the CPU and CUDA. The first eleven arguments are what all share.
std::tuple<at::Tensor, at::Tensor, at::Tensor> guided_sample(
    const at::Tensor& cond, const OptionalTensor& uncond, double guidance_scale, double temperature,
    double top_p, int64_t top_k, double min_p, const OptionalTensor& settings, int64_t legal_begin,
    int64_t legal_end, const OptionalTensor& legal, int64_t seed, int64_t offset,
    const OptionalTensor& numbers, bool truncated);

at::Tensor guided_probabilities(const at::Tensor& cond, const OptionalTensor& uncond,
                                double guidance_scale, double temperature, double top_p,
                                int64_t top_k, double min_p, const OptionalTensor& settings,
                                int64_t legal_begin, int64_t legal_end,
                                const OptionalTensor& legal);

std::tuple<at::Tensor, at::Tensor> guided_largest(
    const at::Tensor& cond, const OptionalTensor& uncond, double guidance_scale, double temperature,
    double top_p, int64_t top_k, double min_p, const OptionalTensor& settings, int64_t legal_begin,
    int64_t legal_end, const OptionalTensor& legal);

at::Tensor guided_weights(const at::Tensor& cond, const OptionalTensor& uncond,
                          double guidance_scale, double temperature, double top_p, int64_t top_k,
                          double min_p, const OptionalTensor& settings, int64_t legal_begin,
                          int64_t legal_end, const OptionalTensor& legal,
                          const at::Tensor& largest);

// Functions of the extension module: a shorter way to guided sampling, and what is for the CPU
// alone.
void bind_average(pybind11::module_& module);
void bind_guided_sampling(pybind11::module_& module);
void bind_cm3(pybind11::module_& module);
void bind_draw(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
void bind_sha256(pybind11::module_& module);

}  // namespace jam
