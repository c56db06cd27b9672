// What computes an operation's rows on the host: one table of functions for each instruction set,
// and one for the CUDA kernels that csrc/emulation runs on the CPU.
#pragma once

#include <cstdint>

#include "jam/guided_sampling.h"

namespace jam {

// Each function does one row. Errors of rows are in what they yield; out is contiguous.
struct Backend {
  const char* name;
  // Draws a token.
  void (*sample)(const GuidedRows&, const GuidedDraws&, int64_t row);
  // The probabilities from which a token is drawn, [vocabulary]; yields 0 or a RowError.
  int64_t (*probabilities)(const GuidedRows&, float* out, int64_t row);
  // The largest guided logit, by the lower id where two are equal; yields the id or a RowError.
  int64_t (*largest)(const GuidedRows&, float* logit, int64_t row);
  // The weights [vocabulary] relative to `max`; yields 0 or a RowError.
  int64_t (*weights)(const GuidedRows&, float max, float* out, int64_t row);
};

const Backend* portable_backend();
// Null where the compiler or this CPU has not its instructions.
const Backend* avx2_backend();
const Backend* avx512_backend();

// The fastest that this CPU has, unless another was set.
const Backend& backend();

}  // namespace jam

// For tests: takes another for all CPU tensors of this process; null goes back to the fastest.
extern "C" void jam_set_backend(const jam::Backend* backend);
extern "C" const jam::Backend* jam_backend(const char* name);  // null: unknown, or not on this CPU
