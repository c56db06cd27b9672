// CUDA kernels on the CPU, for tests: stands in for the header of this name, before it on the path.
//
// A block's threads are fibers of one OS thread. Each runs until it waits for others (a barrier, a
// warp's exchange) or is preempted (at an atomic operation); then another one goes on, drawn at
// random. So a missing barrier shows as a wrong result for some seed, and one that not all threads
// reach as an error. Shared memory has exactly the bytes asked for and begins as NaN. What it does
// not show: races within one stretch between two such points, and memory ordering.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace jam::emulation {

struct Index {
  unsigned x;
};

// Where the running fiber is.
struct Place {
  Index thread, block, num_threads, num_blocks;
};
extern thread_local Place place;

// Runs `kernel` for `num_blocks` blocks, one after the other. Throws std::runtime_error where
// threads wait for ever or for one that has left.
void launch(unsigned num_blocks, unsigned num_threads, size_t bytes,
            const std::function<void()>& kernel);
// Seed of the order in which threads run.
void set_seed(uint64_t seed);

unsigned char* block_memory();
void wait_for_block();
void may_preempt();
// Waits for all lanes of `mask` and returns what each of them gave.
const uint64_t* exchange(unsigned mask, uint64_t given);

template <typename T>
uint64_t packed(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  return word;
}

template <typename T>
T unpacked(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline unsigned lane() { return place.thread.x % 32; }

}  // namespace jam::emulation

#define threadIdx (::jam::emulation::place.thread)
#define blockIdx (::jam::emulation::place.block)
#define blockDim (::jam::emulation::place.num_threads)
#define gridDim (::jam::emulation::place.num_blocks)

using std::max;
using std::min;

inline void __syncthreads() { jam::emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { jam::emulation::exchange(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  const uint64_t* all = jam::emulation::exchange(mask, jam::emulation::packed(value));
  return jam::emulation::unpacked<T>(all[source % 32]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const uint64_t* all = jam::emulation::exchange(mask, jam::emulation::packed(value));
  return jam::emulation::unpacked<T>(all[(jam::emulation::lane() ^ lanes) % 32]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const uint64_t* all = jam::emulation::exchange(mask, jam::emulation::packed(value));
  const unsigned own = jam::emulation::lane();
  return own < lanes ? value : jam::emulation::unpacked<T>(all[own - lanes]);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const uint64_t* all = jam::emulation::exchange(mask, jam::emulation::packed(value));
  const unsigned own = jam::emulation::lane();
  return own + lanes > 31 ? value : jam::emulation::unpacked<T>(all[own + lanes]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* all = jam::emulation::exchange(mask, vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) votes |= static_cast<unsigned>(all[lane] & 1) << lane;
  }
  return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

template <typename T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  jam::emulation::may_preempt();
  const T before = *to;
  *to = before + value;
  return before;
}

template <typename T>
T atomicMax(T* to, std::type_identity_t<T> value) {
  jam::emulation::may_preempt();
  const T before = *to;
  *to = std::max(before, value);
  return before;
}

template <typename T>
T atomicExch(T* to, std::type_identity_t<T> value) {
  jam::emulation::may_preempt();
  const T before = *to;
  *to = value;
  return before;
}

template <typename T>
T atomicCAS(T* to, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  jam::emulation::may_preempt();
  const T before = *to;
  if (before == expected) *to = value;
  return before;
}
