// Guided sampling on CUDA: the kernels on the current stream of the tensors' device.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/guided_sampling.h"
#include "guided_sampling_call.h"

namespace jam {
namespace {

GuidedLaunch launch_of(const GuidedCall& call) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                        call.cond.device().index()));
  return {0,
          call.rows.num_rows,
          kGuidedThreads,
          bytes,
          nullptr,
          c10::cuda::getCurrentCUDAStream().stream()};
}

void sample(const GuidedCall& call, const GuidedDraws& draws) {
  const c10::cuda::CUDAGuard guard(call.cond.device());
  GuidedLaunch launch = launch_of(call);
  const int64_t floats = guided_scratch(call.rows, launch.memory_limit);
  const at::Tensor scratch = call.new_tensor({launch.num_rows, floats}, at::kFloat);
  launch.scratch = scratch.mutable_data_ptr<float>();
  C10_CUDA_CHECK(launch_guided_sample(call.rows, draws, launch));
}

void probabilities(const GuidedCall& call, float* out, int64_t* yielded) {
  const c10::cuda::CUDAGuard guard(call.cond.device());
  C10_CUDA_CHECK(launch_guided_probabilities(call.rows, out, yielded, launch_of(call)));
}

void largest(const GuidedCall& call, float* logits, int64_t* yielded) {
  const c10::cuda::CUDAGuard guard(call.cond.device());
  C10_CUDA_CHECK(launch_guided_largest(call.rows, logits, yielded, launch_of(call)));
}

void weights(const GuidedCall& call, const float* largest, float* out, int64_t* yielded) {
  const c10::cuda::CUDAGuard guard(call.cond.device());
  C10_CUDA_CHECK(launch_guided_weights(call.rows, largest, out, yielded, launch_of(call)));
}

}  // namespace

const GuidedDevice kGuidedCuda{sample, probabilities, largest, weights};

}  // namespace jam
