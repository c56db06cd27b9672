// One row of guided sampling by one block. Its weights stay where they were computed, in shared
// memory if they fit, so that logits are read once. Each warp has a run of adjacent ids, whose sums
// are enough to find the warp that a draw falls on.
#pragma once

#include "jam/block.cuh"
#include "jam/guided_draw.h"

namespace jam {

struct BlockMemory {
  double sums[kMaxWarps];  // of each warp's weights above a floor
  float largest[kMaxWarps];
  int32_t ids[kMaxWarps];  // of these
  bool wrong[kMaxWarps];   // whether a logit is NaN or +inf
  Mass buckets[kNumBuckets];
  int32_t found;  // by one thread, for all
};

template <typename Logit>
class BlockRow {
 public:
  // `weights` is the place of the weights, [num_ids]; null if they are not wanted.
  __device__ BlockRow(const GuidedRows& rows, int64_t index, BlockMemory& memory, float* weights)
      : row_(rows, index), memory_(memory), weights_(weights) {
    const int num_ids = static_cast<int>(row_.num_ids), warps = num_warps();
    const int run = ((num_ids + warps - 1) / warps + kWarpSize - 1) / kWarpSize * kWarpSize;
    begin_ = min(warp_of_thread() * run, num_ids);
    end_ = min(begin_ + run, num_ids);
  }

  __device__ const GuidedRow<Logit>& settings() const { return row_; }
  __device__ float max() const { return max_; }
  __device__ int64_t id_of_max() const { return id_of_max_; }
  __device__ double total() const { return total_; }
  __device__ double restart() { return sum_above(0.0f); }
  __device__ float weight(int64_t id) const { return weights_[id]; }
  __device__ void set_place(float* weights) { weights_ = weights; }

  // Guided logits into the weights' place. Returns 0 or a RowError.
  __device__ int64_t find_max() {
    if (row_.error) return row_.error;
    float largest = -kInfinity;
    int32_t id = INT32_MAX;
    bool wrong = false;
    for (int i = begin_ + lane_of_thread(); i < end_; i += kWarpSize) {
      const float logit = row_.logit(i);
      if (weights_) weights_[i] = logit;
      wrong |= !(logit < kInfinity);
      if (logit > largest) {
        largest = logit;
        id = i;
      }
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, step);
      const int32_t other_id = __shfl_xor_sync(kAllLanes, id, step);
      if (other > largest || (other == largest && other_id < id)) {
        largest = other;
        id = other_id;
      }
    }
    wrong = __any_sync(kAllLanes, wrong);
    if (lane_of_thread() == 0) {
      memory_.largest[warp_of_thread()] = largest;
      memory_.ids[warp_of_thread()] = id;
      memory_.wrong[warp_of_thread()] = wrong;
    }
    __syncthreads();
    max_ = -kInfinity;
    for (int warp = 0; warp < num_warps(); ++warp) {
      if (memory_.wrong[warp]) return kNotFinite;
      if (memory_.largest[warp] > max_) {  // an equal one of a later warp has a higher id
        max_ = memory_.largest[warp];
        id_of_max_ = memory_.ids[warp];
      }
    }
    return max_ == -kInfinity ? static_cast<int64_t>(kNothingLegal) : 0;
  }

  // Logits to weights relative to `max`.
  __device__ void weigh(float max) {
    for (int i = begin_ + lane_of_thread(); i < end_; i += kWarpSize) {
      weights_[i] = weight_of(weights_[i], max, row_.scale);
    }
    __syncwarp();  // find_id has another distribution of ids over a warp's lanes
    total_ = sum_above(0.0f);
  }

  __device__ double sum_above(float floor, double = 0) {
    double own = 0;
    for (int i = begin_ + lane_of_thread(); i < end_; i += kWarpSize) {
      if (weights_[i] > floor) own += weights_[i];
    }
    own = warp_sum(own);
    __syncthreads();  // the last sums have been read
    if (lane_of_thread() == 0) memory_.sums[warp_of_thread()] = own;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < num_warps(); ++warp) sum += memory_.sums[warp];
    return sum;
  }

  __device__ int64_t find_id(float floor, double target) {
    int owner = 0;
    double before = 0;
    while (before + memory_.sums[owner] <= target) before += memory_.sums[owner++];
    if (warp_of_thread() == owner) find_in_warp(floor, target - before);
    __syncthreads();
    return memory_.found;
  }

  __device__ float floor_of(Quota quota) {
    Mass passed{0.0, 0};  // of thread 0
    uint32_t prefix = 0;
    for (int digit = 0; digit < kNumDigits; ++digit) {
      const int shift = shift_of_digit(digit), num = buckets_of_digit(digit);
      for (int i = threadIdx.x; i < num; i += blockDim.x) memory_.buckets[i] = {0.0, 0};
      __syncthreads();
      for (int i = begin_ + lane_of_thread(); i < end_; i += kWarpSize) {
        const float weight = weights_[i];
        const uint32_t upper = key_of(weight) >> shift;
        if (weight > 0 && upper / num == prefix) {
          Mass& bucket = memory_.buckets[upper % num];
          atomicAdd(&bucket.sum, static_cast<double>(weight));
          atomicAdd(&bucket.count, 1);
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) memory_.found = bucket_of(quota, memory_.buckets, num, passed);
      __syncthreads();
      const int bucket = memory_.found;
      if (bucket < 0) return 0.0f;  // all weights together do not reach it
      prefix = prefix * num + bucket;
    }
    return floor_of_key(prefix);
  }

 private:
  GuidedRow<Logit> row_;
  BlockMemory& memory_;
  float* weights_;
  int begin_, end_;  // of this warp's ids
  float max_ = 0;
  int32_t id_of_max_ = 0;
  double total_ = 0;

  // A run of adjacent ids for each lane; the one on whose run the draw falls walks it.
  __device__ void find_in_warp(float floor, double target) {
    const int run = (end_ - begin_ + kWarpSize - 1) / kWarpSize;
    const int begin = min(begin_ + lane_of_thread() * run, end_), end = min(begin + run, end_);
    double own = 0;
    for (int i = begin; i < end; ++i) {
      if (weights_[i] > floor) own += weights_[i];
    }
    const double after = warp_running_sum(own);
    double sum = after - own;
    if (!(sum <= target && target < after)) return;  // all but one
    for (int i = begin; i < end; ++i) {
      if (weights_[i] > floor) sum += weights_[i];
      if (sum > target) {
        memory_.found = i;
        return;
      }
    }
  }
};

}  // namespace jam
