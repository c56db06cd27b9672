// The CUDA kernels of guided sampling, without the headers of torch.
#pragma once

#include <cuda_runtime.h>

#include "jam/guided_sampling.h"

namespace jam {

constexpr int kGuidedThreads = 512;

// How kernels are launched: a block for each of `num_rows` rows from `first_row` on.
struct GuidedLaunch {
  int64_t first_row, num_rows;
  int threads;           // a multiple of 32, at most kGuidedThreads
  int64_t memory_limit;  // bytes of shared memory that a block may have
  float* scratch;        // [num_rows, guided_scratch()]
  cudaStream_t stream;
};

// How many floats of scratch memory a row's draw needs: 0 where its weights fit into shared memory.
int64_t guided_scratch(const GuidedRows& rows, int64_t memory_limit);

cudaError_t launch_guided_sample(const GuidedRows& rows, const GuidedDraws& draws,
                                 const GuidedLaunch& launch);
cudaError_t launch_guided_probabilities(const GuidedRows& rows, float* out, int64_t* yielded,
                                        const GuidedLaunch& launch);
cudaError_t launch_guided_largest(const GuidedRows& rows, float* logits, int64_t* yielded,
                                  const GuidedLaunch& launch);
cudaError_t launch_guided_weights(const GuidedRows& rows, const float* largest, float* out,
                                  int64_t* yielded, const GuidedLaunch& launch);

}  // namespace jam
