// The checks of guided sampling that its launchers share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "jam/guided_sampling.h"

namespace jam {

// The op as raw pointers, with the tensors that keep them alive. Raises a ValueError that names the
// argument of a wrong shape, dtype or device.
struct GuidedSamplingCall {
  at::Tensor cond, uncond, guidance_scale, temperature, top_p, legal, seed, offset, tokens;
  GuidedSampling op;

  GuidedSamplingCall(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                     const at::Tensor& guidance_scale, const at::Tensor& temperature,
                     const at::Tensor& top_p, const std::optional<at::Tensor>& legal,
                     const at::Tensor& seed, const at::Tensor& offset);
};

// Raises a ValueError that names the first row which yielded a RowError. On a GPU it waits for it.
void check_rows(const at::Tensor& tokens);

}  // namespace jam
