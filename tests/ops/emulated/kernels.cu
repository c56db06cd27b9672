// Small kernels with known results and known faults, for the tests of csrc/emulation.
#include "jam/block.cuh"

#ifndef __CUDACC__
#include <cstdio>
#include <stdexcept>
#endif

namespace {

// Reverses `values` through shared memory; without the barrier if `barrier` is 0.
__global__ void reverse(int* values, int barrier) {
  JAM_BLOCK_MEMORY(bytes);
  int* const shared = reinterpret_cast<int*>(bytes);
  const int base = blockIdx.x * blockDim.x, last = blockDim.x - 1;
  shared[threadIdx.x] = values[base + threadIdx.x];
  if (barrier) __syncthreads();
  values[base + threadIdx.x] = shared[last - threadIdx.x];
}

// Each thread adds its neighbour's value, step after step; `barriers` of the two a step needs.
__global__ void rotate(int* values, int barriers) {
  JAM_BLOCK_MEMORY(bytes);
  int* const shared = reinterpret_cast<int*>(bytes);
  int own = values[threadIdx.x];
  for (int step = 0; step < 4; ++step) {
    shared[threadIdx.x] = own;
    if (barriers > 0) __syncthreads();
    own += shared[(threadIdx.x + 1) % blockDim.x];
    if (barriers > 1) __syncthreads();
  }
  values[threadIdx.x] = own;
}

// Warps: sums, running sums, shuffles and votes.
__global__ void warps(int* values, int) {
  const int lane = jam::lane_of_thread(), own = values[threadIdx.x];
  int* const out = values + blockDim.x * (1 + threadIdx.x);
  out[0] = jam::warp_sum(own);
  out[1] = static_cast<int>(jam::warp_running_sum(own));
  out[2] = __shfl_sync(jam::kAllLanes, own, 7);
  out[3] = __shfl_down_sync(jam::kAllLanes, own, 3);
  out[4] = static_cast<int>(__ballot_sync(jam::kAllLanes, own % 3 == 0));
  out[5] = __any_sync(jam::kAllLanes, own == 40);
  out[6] = __all_sync(jam::kAllLanes, own < 1000);
  if (lane < 16) out[7] = __shfl_xor_sync(0xFFFFu, own, 1);
}

// Counts and sums from all threads into two places.
__global__ void atomics(int* values, int) {
  atomicAdd(&values[blockDim.x], values[threadIdx.x]);
  atomicMax(&values[blockDim.x + 1], values[threadIdx.x]);
}

// A sum from all threads that is not atomic: another thread may run between reading and adding.
__global__ void lost_updates(int* values, int) {
  const int before = values[blockDim.x];
  atomicAdd(&values[blockDim.x + 1], 1);
  values[blockDim.x] = before + 1;
}

// Not all threads reach the barrier.
__global__ void divergent(int*, int) {
  if (threadIdx.x % 2) __syncthreads();
}

// A warp's exchange whose mask names a lane that has left.
__global__ void half_a_warp(int* values, int) {
  if (jam::lane_of_thread() < 16) values[threadIdx.x] = __shfl_xor_sync(jam::kAllLanes, 1, 1);
}

// Shared memory that nobody has written.
__global__ void unwritten(int* values, int) {
  JAM_BLOCK_MEMORY(bytes);
  values[threadIdx.x] = reinterpret_cast<int*>(bytes)[threadIdx.x];
}

}  // namespace

#ifndef __CUDACC__
// Runs kernel `which`; 0, or 1 with a message where the emulator refuses.
extern "C" int run_kernel(int which, int blocks, int threads, int* values, int argument,
                          uint64_t seed, char* message) {
  using Kernel = void (*)(int*, int);
  constexpr Kernel kKernels[] = {reverse,      rotate,    warps,       atomics,
                                 lost_updates, divergent, half_a_warp, unwritten};
  const Kernel kernel = kKernels[which];
  jam::emulation::set_seed(seed);
  try {
    JAM_LAUNCH(kernel, blocks, threads, threads * sizeof(int), nullptr, values, argument);
  } catch (const std::runtime_error& error) {
    std::snprintf(message, 200, "%s", error.what());
    return 1;
  }
  return 0;
}
#endif
