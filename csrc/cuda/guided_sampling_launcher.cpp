// Guided sampling on CUDA: the shared checks, then the kernel on the current stream of the device.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/guided_sampling.h"
#include "guided_sampling_call.h"
#include "launchers.h"

namespace jam {

at::Tensor guided_sample_cuda(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                              const at::Tensor& guidance_scale, const at::Tensor& temperature,
                              const at::Tensor& top_p, const std::optional<at::Tensor>& legal,
                              const at::Tensor& seed, const at::Tensor& offset) {
  const c10::cuda::CUDAGuard guard(cond.device());
  const GuidedSamplingCall call(cond, uncond, guidance_scale, temperature, top_p, legal, seed,
                                offset);
  C10_CUDA_CHECK(launch_guided_sample(call.op, c10::cuda::getCurrentCUDAStream()));
  check_rows(call.tokens);
  return call.tokens;
}

}  // namespace jam
