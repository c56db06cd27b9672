// The extension megatron_jam._C: importing it registers the operators torch.ops.megatron_jam.*.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "launchers.h"

namespace {

// What the operators of guided sampling share. `settings` is float64 [rows, 5]: the five numbers
// before it, for each row; `legal` is bool [rows, vocabulary], or int64 [rows, 2]: ranges of ids.
const std::string kGuidedRows =
    "(Tensor cond, Tensor? uncond, float guidance_scale, float temperature, float top_p, int top_k,"
    " float min_p, Tensor? settings, SymInt legal_begin, SymInt legal_end, Tensor? legal";

}  // namespace

TORCH_LIBRARY(megatron_jam, library) {
  // `numbers` is int64 [rows, 2]: (seed, offset), for each row.
  library.def(("guided_sample" + kGuidedRows +
               ", int seed, int offset, Tensor? numbers, bool truncated)"
               " -> (Tensor tokens, Tensor log_probability, Tensor truncated_log_probability)")
                  .c_str());
  library.def(("guided_probabilities" + kGuidedRows + ") -> Tensor").c_str());
  library.def(("guided_largest" + kGuidedRows + ") -> (Tensor logits, Tensor ids)").c_str());
  library.def(("guided_weights" + kGuidedRows + ", Tensor largest) -> Tensor").c_str());
}

TORCH_LIBRARY_IMPL(megatron_jam, CPU, library) {
  library.impl("guided_sample", &jam::guided_sample);
  library.impl("guided_probabilities", &jam::guided_probabilities);
  library.impl("guided_largest", &jam::guided_largest);
  library.impl("guided_weights", &jam::guided_weights);
}

#ifdef MEGATRON_JAM_CUDA
TORCH_LIBRARY_IMPL(megatron_jam, CUDA, library) {
  library.impl("guided_sample", &jam::guided_sample);
  library.impl("guided_probabilities", &jam::guided_probabilities);
  library.impl("guided_largest", &jam::guided_largest);
  library.impl("guided_weights", &jam::guided_weights);
}
#endif

// What Python calls without torch's dispatcher.
PYBIND11_MODULE(_C, module) {
  jam::bind_guided_sampling(module);
  jam::bind_average(module);
  jam::bind_cm3(module);
  jam::bind_draw(module);
  jam::bind_packing(module);
  jam::bind_sha256(module);
}
