// A call of guided sampling: its arguments, checked, and the device that runs it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "jam/guided_sampling.h"

namespace jam {

// The arguments that all its operators share. A number is every row's; a tensor with a row each
// takes the numbers' place.
struct GuidedArguments {
  const at::Tensor& cond;
  const std::optional<at::Tensor>& uncond;
  GuidedSettings settings;
  const std::optional<at::Tensor>& row_settings;
  int64_t legal_begin, legal_end;
  const std::optional<at::Tensor>& legal;
};

// The rows as raw pointers, with the tensors that keep them alive. Raises a ValueError that names
// the argument of a wrong shape, dtype or device.
struct GuidedCall {
  at::Tensor cond, uncond, settings, legal;
  GuidedRows rows{};

  explicit GuidedCall(const GuidedArguments& arguments);

  // A tensor with one value for each row, or several, in the order of the rows in memory.
  at::Tensor checked(const at::Tensor& values, const char* name, int64_t columns,
                     at::ScalarType type) const;
  at::Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType type) const;
};

// What runs the rows of a call. `yielded` is an id or a RowError, int64 [rows].
struct GuidedDevice {
  void (*sample)(const GuidedCall&, const GuidedDraws&);
  void (*probabilities)(const GuidedCall&, float* out, int64_t* yielded);
  void (*largest)(const GuidedCall&, float* logits, int64_t* yielded);
  void (*weights)(const GuidedCall&, const float* largest, float* out, int64_t* yielded);
};

extern const GuidedDevice kGuidedCpu;
extern const GuidedDevice kGuidedCuda;  // where the extension was built with CUDA

// What a call yields: [rows] each.
struct GuidedDrawn {
  at::Tensor tokens, log_probability;
  at::Tensor truncated_log_probability;  // undefined if not asked
};

// Draws with the seeds and offsets of `draws`, whose other members it sets. Raises a ValueError
// that names the first row which cannot be drawn from.
GuidedDrawn draw(const GuidedCall& call, GuidedDraws draws, bool truncated);

}  // namespace jam
