// Guided sampling on CUDA: one block per row, a run of adjacent ids per thread.
#include "cuda/guided_sampling.h"

namespace jam {
namespace {

constexpr int kThreads = 256;

struct Shared {
  Largest largest[kThreads];
  double sums[kThreads];  // of each thread's weights above the floor
  Largest best;
  double mass;    // of all threads
  double before;  // the mass of the threads before the owner
  int owner;      // the thread in whose ids the draw falls
  int64_t id;
};

// A barrier stands behind each step of thread 0, and before it whatever it reads is complete.
template <typename Logit>
__device__ void find_largest(Shared& shared, const GuidedRow<Logit>& row, int64_t begin,
                             int64_t end) {
  shared.largest[threadIdx.x] = largest_logit(row, begin, end);
  __syncthreads();
  if (threadIdx.x == 0) {
    Largest best{kMinusInfinity, kNothingLegal};
    for (int thread = 0; thread < kThreads; ++thread) {
      const Largest& other = shared.largest[thread];
      if (other.id == kNotFinite) {
        best = other;
        break;
      }
      if (other.logit > best.logit) best = other;
    }
    shared.best = best;
  }
  __syncthreads();
}

template <typename Logit>
__device__ void sum_mass(Shared& shared, const GuidedRow<Logit>& row, float floor, int64_t begin,
                         int64_t end) {
  shared.sums[threadIdx.x] = mass_above(row, shared.best.logit, floor, begin, end);
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.mass = 0;
    for (int thread = 0; thread < kThreads; ++thread) shared.mass += shared.sums[thread];
  }
  __syncthreads();
}

// The id on which the draw of this round falls. The sums are those of the same floor.
template <typename Logit>
__device__ int64_t draw(Shared& shared, const GuidedRow<Logit>& row, float floor, uint32_t round,
                        int64_t begin, int64_t end) {
  const double target = philox_uniform(row.seed, row.offset, round) * shared.mass;
  if (threadIdx.x == 0) {
    shared.before = 0;
    shared.owner = 0;
    while (shared.before + shared.sums[shared.owner] <= target) {
      shared.before += shared.sums[shared.owner++];
    }
  }
  __syncthreads();
  if (threadIdx.x == shared.owner) {
    shared.id = find_id(row, shared.best.logit, floor, shared.before, target, begin, end);
  }
  __syncthreads();
  return shared.id;
}

template <typename Logit>
__global__ void __launch_bounds__(kThreads, 4) guided_sample_kernel(GuidedSampling op) {
  __shared__ Shared shared;
  const GuidedRow<Logit> row(op, blockIdx.x);
  int64_t token = kWrongSetting;
  if (row.valid) {  // the same for all threads of the block, as is every branch around a barrier
    const int64_t run = (row.vocabulary + kThreads - 1) / kThreads;
    const int64_t begin = min(threadIdx.x * run, row.vocabulary);
    const int64_t end = min(begin + run, row.vocabulary);
    find_largest(shared, row, begin, end);
    token = shared.best.id;
    if (token >= 0 && !row.greedy) {
      float floor = 0;
      sum_mass(shared, row, floor, begin, end);
      const double nucleus = row.top_p * shared.mass;
      for (uint32_t round = 0;; ++round) {
        token = draw(shared, row, floor, round, begin, end);
        floor = row.weight(token, shared.best.logit);
        sum_mass(shared, row, floor, begin, end);
        if (shared.mass < nucleus) break;
      }
    }
  }
  if (threadIdx.x == 0) op.tokens[blockIdx.x] = token;
}

}  // namespace

cudaError_t launch_guided_sample(const GuidedSampling& op, cudaStream_t stream) {
  if (op.num_rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(op.num_rows)), block(kThreads);
  switch (op.type) {
    case LogitType::kFloat32:
      guided_sample_kernel<float><<<grid, block, 0, stream>>>(op);
      break;
    case LogitType::kBFloat16:
      guided_sample_kernel<BFloat16><<<grid, block, 0, stream>>>(op);
      break;
    case LogitType::kFloat16:
      guided_sample_kernel<Float16><<<grid, block, 0, stream>>>(op);
      break;
  }
  return cudaGetLastError();
}

}  // namespace jam
