// What the threads of a block do together, and how a kernel is launched: under nvcc on a GPU, under
// a C++ compiler on the CPU (csrc/emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef __CUDACC__
#define JAM_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  kernel<<<grid, threads, bytes, stream>>>(__VA_ARGS__)
#define JAM_BLOCK_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define JAM_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  ::jam::emulation::launch(grid, threads, bytes, [=] { kernel(__VA_ARGS__); })
#define JAM_BLOCK_MEMORY(name) unsigned char* const name = ::jam::emulation::block_memory()
#endif

namespace jam {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / kWarpSize; }
__device__ __forceinline__ int num_warps() { return blockDim.x / kWarpSize; }

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// The sum over this lane and those before it.
__device__ __forceinline__ double warp_running_sum(double value) {
  for (int step = 1; step < kWarpSize; step *= 2) {
    const double before = __shfl_up_sync(kAllLanes, value, step);
    if (lane_of_thread() >= step) value += before;
  }
  return value;
}

}  // namespace jam
