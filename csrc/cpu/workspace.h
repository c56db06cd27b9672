// A thread's memory between rows: fresh pages cost more than a whole draw.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace jam {

struct Workspace {
  float* weights = nullptr;                   // [padded number of ids]
  float* bounds = nullptr;                    // of each block: no weight of it is larger
  int64_t *sums = nullptr, *above = nullptr;  // of each block: all weights, those above a floor
  uint8_t* states = nullptr;                  // of each block

  // Room for `num_blocks` blocks of `block` ids; contents are undefined.
  void reserve(int64_t num_blocks, int64_t block) {
    const int64_t bytes = num_blocks * (block * 4 + 4 + 8 + 8 + 1) + 5 * kAlignment;
    if (bytes > size_) {
      size_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size_)));
      if (!memory_) throw std::bad_alloc();
    }
    char* next = memory_.get();
    weights = take<float>(next, num_blocks * block);
    bounds = take<float>(next, num_blocks);
    sums = take<int64_t>(next, num_blocks);
    above = take<int64_t>(next, num_blocks);
    states = take<uint8_t>(next, num_blocks);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;

  template <typename T>
  static T* take(char*& next, int64_t num) {
    T* const taken = reinterpret_cast<T*>(next);
    next += (num * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
};

Workspace& workspace();  // this thread's

}  // namespace jam
