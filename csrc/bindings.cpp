// The extension megatron_jam._C: importing it registers the operators torch.ops.megatron_jam.*.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "launchers.h"

TORCH_LIBRARY(megatron_jam, library) {
  library.def(
      "guided_sample(Tensor cond, Tensor? uncond, Tensor guidance_scale, Tensor temperature, "
      "Tensor top_p, Tensor? legal, Tensor seed, Tensor offset) -> Tensor");
  library.def("weighted_average(Tensor a, Tensor b, float share) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_jam, CPU, library) {
  library.impl("guided_sample", &jam::guided_sample_cpu);
  library.impl("weighted_average", &jam::weighted_average_cpu);
}

#ifdef MEGATRON_JAM_CUDA
TORCH_LIBRARY_IMPL(megatron_jam, CUDA, library) {
  library.impl("guided_sample", &jam::guided_sample_cuda);
}
#endif

// What works on numpy arrays, for the data path.
PYBIND11_MODULE(_C, module) {
  jam::bind_cm3(module);
  jam::bind_packing(module);
}
