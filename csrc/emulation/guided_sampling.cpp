// The CUDA kernels of guided sampling as a backend for CPU tensors.
#include "../cuda/guided_sampling.cu"

#include <vector>

#include "jam/backend.h"

namespace jam {
namespace {

thread_local std::vector<float> scratch;
int threads = 64;
int64_t memory_limit = 227 << 10;

GuidedLaunch launch_of(int64_t row) { return {row, 1, threads, memory_limit, nullptr, nullptr}; }

void sample_emulated(const GuidedRows& rows, const GuidedDraws& draws, int64_t row) {
  GuidedLaunch launch = launch_of(row);
  scratch.resize(guided_scratch(rows, memory_limit));
  launch.scratch = scratch.data();
  launch_guided_sample(rows, draws, launch);
}

// The kernels write to the row's place in the whole result.
int64_t probabilities_emulated(const GuidedRows& rows, float* out, int64_t row) {
  int64_t yielded;
  launch_guided_probabilities(rows, out - row * rows.vocabulary, &yielded - row, launch_of(row));
  return yielded;
}

int64_t largest_emulated(const GuidedRows& rows, float* logit, int64_t row) {
  int64_t yielded;
  launch_guided_largest(rows, logit - row, &yielded - row, launch_of(row));
  return yielded;
}

int64_t weights_emulated(const GuidedRows& rows, float max, float* out, int64_t row) {
  int64_t yielded;
  launch_guided_weights(rows, &max - row, out - row * rows.vocabulary, &yielded - row,
                        launch_of(row));
  return yielded;
}

constexpr Backend kBackend{"emulated", sample_emulated, probabilities_emulated, largest_emulated,
                           weights_emulated};

}  // namespace
}  // namespace jam

extern "C" {

const jam::Backend* jam_emulated_backend() { return &jam::kBackend; }

void jam_emulate_with(int num_threads, int64_t memory_limit, uint64_t seed) {
  jam::threads = num_threads;
  jam::memory_limit = memory_limit;
  jam::emulation::set_seed(seed);
}
}
