// Guided sampling on CUDA: one block per row.
#include "cuda/guided_block.cuh"
#include "cuda/guided_sampling.h"

namespace jam {
namespace {

constexpr int64_t kMemoryBytes = (sizeof(BlockMemory) + 15) / 16 * 16;

template <typename Logit>
__global__ void __launch_bounds__(kGuidedThreads, 2)
    sample_kernel(GuidedRows rows, GuidedDraws draws, int64_t first_row, float* scratch,
                  int64_t scratch_stride) {
  JAM_BLOCK_MEMORY(bytes);
  float* const weights = scratch_stride ? scratch + blockIdx.x * scratch_stride
                                        : reinterpret_cast<float*>(bytes + kMemoryBytes);
  const int64_t index = first_row + blockIdx.x;
  BlockRow<Logit> row(rows, index, *reinterpret_cast<BlockMemory*>(bytes), weights);
  const Drawn drawn = draw_of(row, row.find_max(), draws, index);
  if (threadIdx.x == 0) write_drawn(drawn, row.settings(), draws, index);
}

// The rest of a row of results, outside of the legal range, is 0.
template <typename Logit>
__device__ void write_rest(const GuidedRows& rows, const GuidedRow<Logit>& settings, float* out) {
  for (int64_t id = threadIdx.x; id < rows.vocabulary; id += blockDim.x) {
    if (id < settings.first_id || id >= settings.first_id + settings.num_ids) out[id] = 0.0f;
  }
}

template <typename Logit>
__global__ void __launch_bounds__(kGuidedThreads, 2)
    probabilities_kernel(GuidedRows rows, float* out, int64_t* yielded, int64_t first_row) {
  JAM_BLOCK_MEMORY(bytes);
  const int64_t index = first_row + blockIdx.x;
  out += index * rows.vocabulary;
  BlockRow<Logit> row(rows, index, *reinterpret_cast<BlockMemory*>(bytes), nullptr);
  const GuidedRow<Logit>& settings = row.settings();
  write_rest(rows, settings, out);
  out += settings.first_id;
  row.set_place(out);
  const int64_t error = row.find_max();
  if (threadIdx.x == 0) yielded[index] = error;
  if (error) return;
  float floor = 0;
  double sum = 1;
  if (!settings.greedy) {
    row.weigh(row.max());
    floor = floor_of_all(row, before_top_p(row));
    sum = row.sum_above(floor);
  }
  __syncthreads();  // the weights have been read for the last time
  for (int64_t id = threadIdx.x; id < settings.num_ids; id += blockDim.x) {
    if (settings.greedy) {
      out[id] = id == row.id_of_max() ? 1.0f : 0.0f;
    } else {
      out[id] = out[id] > floor ? static_cast<float>(out[id] / sum) : 0.0f;
    }
  }
}

template <typename Logit>
__global__ void __launch_bounds__(kGuidedThreads, 2)
    largest_kernel(GuidedRows rows, float* logits, int64_t* yielded, int64_t first_row) {
  JAM_BLOCK_MEMORY(bytes);
  const int64_t index = first_row + blockIdx.x;
  BlockRow<Logit> row(rows, index, *reinterpret_cast<BlockMemory*>(bytes), nullptr);
  const int64_t error = row.find_max();
  if (threadIdx.x != 0) return;
  logits[index] = error ? -kInfinity : row.max();
  yielded[index] = error ? error : row.settings().first_id + row.id_of_max();
}

template <typename Logit>
__global__ void __launch_bounds__(kGuidedThreads, 2)
    weights_kernel(GuidedRows rows, const float* largest, float* out, int64_t* yielded,
                   int64_t first_row) {
  JAM_BLOCK_MEMORY(bytes);
  const int64_t index = first_row + blockIdx.x;
  out += index * rows.vocabulary;
  BlockRow<Logit> row(rows, index, *reinterpret_cast<BlockMemory*>(bytes), nullptr);
  write_rest(rows, row.settings(), out);
  row.set_place(out + row.settings().first_id);
  const int64_t error = row.find_max();
  const bool empty = error == kNothingLegal;  // another shard's ids may be
  if (threadIdx.x == 0) yielded[index] = empty ? 0 : error;
  if (!error || empty) row.weigh(largest[index]);
}

// Launches the instance of a kernel for the rows' type of logits.
#define JAM_LAUNCH_FOR(kernel, rows, launch, bytes, ...)                                        \
  do {                                                                                          \
    if ((launch).num_rows == 0) return cudaSuccess;                                             \
    const auto run = [&](auto* instance) {                                                      \
      const cudaError_t error = cudaFuncSetAttribute(                                           \
          instance, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));      \
      if (error != cudaSuccess) return error;                                                   \
      JAM_LAUNCH(instance, static_cast<unsigned>((launch).num_rows), (launch).threads, (bytes), \
                 (launch).stream, __VA_ARGS__);                                                 \
      return cudaGetLastError();                                                                \
    };                                                                                          \
    switch ((rows).type) {                                                                      \
      case LogitType::kBFloat16:                                                                \
        return run(kernel<BFloat16>);                                                           \
      case LogitType::kFloat16:                                                                 \
        return run(kernel<Float16>);                                                            \
      default:                                                                                  \
        return run(kernel<float>);                                                              \
    }                                                                                           \
  } while (false)

int64_t most_ids(const GuidedRows& rows) {
  return rows.legal_ranges ? rows.vocabulary : rows.legal_end - rows.legal_begin;
}

}  // namespace

int64_t guided_scratch(const GuidedRows& rows, int64_t memory_limit) {
  const int64_t ids = most_ids(rows) > 0 ? most_ids(rows) : 0;
  return kMemoryBytes + ids * static_cast<int64_t>(sizeof(float)) <= memory_limit ? 0 : ids;
}

cudaError_t launch_guided_sample(const GuidedRows& rows, const GuidedDraws& draws,
                                 const GuidedLaunch& launch) {
  const int64_t scratch = guided_scratch(rows, launch.memory_limit);
  const int64_t ids = most_ids(rows) > 0 && !scratch ? most_ids(rows) : 0;
  const int64_t bytes = kMemoryBytes + ids * static_cast<int64_t>(sizeof(float));
  JAM_LAUNCH_FOR(sample_kernel, rows, launch, bytes, rows, draws, launch.first_row, launch.scratch,
                 scratch);
}

cudaError_t launch_guided_probabilities(const GuidedRows& rows, float* out, int64_t* yielded,
                                        const GuidedLaunch& launch) {
  JAM_LAUNCH_FOR(probabilities_kernel, rows, launch, kMemoryBytes, rows, out, yielded,
                 launch.first_row);
}

cudaError_t launch_guided_largest(const GuidedRows& rows, float* logits, int64_t* yielded,
                                  const GuidedLaunch& launch) {
  JAM_LAUNCH_FOR(largest_kernel, rows, launch, kMemoryBytes, rows, logits, yielded,
                 launch.first_row);
}

cudaError_t launch_guided_weights(const GuidedRows& rows, const float* largest, float* out,
                                  int64_t* yielded, const GuidedLaunch& launch) {
  JAM_LAUNCH_FOR(weights_kernel, rows, launch, kMemoryBytes, rows, largest, out, yielded,
                 launch.first_row);
}

}  // namespace jam
