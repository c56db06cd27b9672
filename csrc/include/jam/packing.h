// Reading a row of tokens out of documents that stand in another order than in their file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "jam/retrieval.h"
#include "jam/runs.h"

namespace jam {

// An epoch's order of documents: the stream is their tokens in that order, in a row.
struct Order {
  const uint32_t* numbers;  // [size]: which document comes
  const int64_t* ends;      // [size]: tokens of the stream up to and with it
  int64_t size;
  int64_t seed;  // of what stands in front of each document

  int64_t num_tokens() const { return size ? ends[size - 1] : 0; }
};

// Calls use(from, count, place) for the file's slices, in order, of which the stream's tokens
// [start, stop) are made; `place` is the document's in the order.
template <typename Use>
void for_slices(const Order& order, const int64_t* starts, const Retrieval* retrieval,
                int64_t start, int64_t stop, Use use) {
  const int64_t* const ends = order.ends;
  int64_t place = std::upper_bound(ends, ends + order.size, start) - ends;
  for (int64_t at = place ? ends[place - 1] : 0; at < stop; ++place) {
    const auto use_part = [&](int64_t from, int64_t to) {
      const int64_t low = std::max(start, at), high = std::min(stop, at + to - from);
      if (low < high) use(from + low - at, high - low, place);
      at += to - from;
    };
    const int64_t number = order.numbers[place];
    if (retrieval) {
      retrieval->lay_out(order.seed, number, use_part);
    } else {
      use_part(starts[number], starts[number] + ends[place] - at);
    }
  }
}

// Asks the memory for the stream's tokens [start, stop), which are in it, and waits for none.
template <typename Token>
void prefetch_stream(const Token* tokens, const int64_t* starts, const Retrieval* retrieval,
                     const Order& order, int64_t start, int64_t stop) {
  for_slices(order, starts, retrieval, start, stop, [&](int64_t from, int64_t count, int64_t) {
    constexpr int64_t kLine = 64 / sizeof(Token);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(tokens + from + i);
  });
}

// Copies the stream's tokens [start, stop), which are in it, behind those that `runs` counts, and
// its documents to `runs` with numbers of their own. The loop over tokens is the caller's:
// copy(from, count, to).
template <typename Token, typename Copy>
void read_stream(const Token* tokens, const int64_t* starts, const Retrieval* retrieval,
                 const Order& order, int64_t start, int64_t stop, int32_t* out_tokens, Runs& runs,
                 Copy copy) {
  // The documents lie anywhere in the file: all are asked for before the first is waited for.
  prefetch_stream(tokens, starts, retrieval, order, start, stop);
  int64_t latest = -1;
  int32_t document = 0;
  for_slices(order, starts, retrieval, start, stop,
             [&](int64_t from, int64_t count, int64_t place) {
               if (place != latest) document = runs.next_document();
               latest = place;
               copy(tokens + from, count, out_tokens + runs.size());
               runs.append(document, count);
             });
  // Most often the next block is read next.
  prefetch_stream(tokens, starts, retrieval, order, stop,
                  std::min(2 * stop - start, order.num_tokens()));
}

// Where blocks of whole documents start in a stream, and its end: as many documents each as fit
// into block_size tokens, none of which is longer.
inline std::vector<int64_t> pack_greedily(const int64_t* ends, int64_t num_documents,
                                          int64_t block_size) {
  std::vector<int64_t> starts{0};
  int64_t before = 0;
  for (int64_t i = 0; i < num_documents; ++i) {
    if (ends[i] - starts.back() > block_size) starts.push_back(before);
    before = ends[i];
  }
  starts.push_back(before);
  return starts;
}

}  // namespace jam
