// The CUDA kernel of guided sampling, without the headers of torch.
#pragma once

#include <cuda_runtime.h>

#include "jam/guided_sampling.h"

namespace jam {

cudaError_t launch_guided_sample(const GuidedSampling& op, cudaStream_t stream);

}  // namespace jam
