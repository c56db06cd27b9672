// Reading a row of tokens out of documents that stand in another order than in their file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace jam {

// A set and an order of its documents: the stream is their tokens in that order, in a row.
template <typename Token>
struct Stream {
  const Token* tokens;    // of the whole file
  const int64_t* starts;  // first token of each document in the file
  const uint32_t* order;  // [num_documents]: which document comes
  const int64_t* ends;    // [num_documents]: tokens of the stream up to and with it
  int64_t num_documents;

  // The stream's token `at`, which is in the document at `place` of the order.
  const Token* token(int64_t place, int64_t at) const {
    return tokens + starts[order[place]] + (at - (place ? ends[place - 1] : 0));
  }
};

struct Filled {
  int64_t size;      // tokens written
  int32_t document;  // the next document's number
};

template <typename Token>
void prefetch(const Token* tokens, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Token);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(tokens + i);
}

// Copies the stream's tokens [start, stop), which are in it, and numbers their documents from
// `document` on.
template <typename Token>
Filled read_stream(const Stream<Token>& stream, int64_t start, int64_t stop, int32_t document,
                   int32_t* out_tokens, int32_t* out_documents) {
  const int64_t* const ends = stream.ends;
  int64_t place = std::upper_bound(ends, ends + stream.num_documents, start) - ends;
  // The documents lie anywhere in the file: all are asked for before the first is waited for.
  for (int64_t ahead = place, at = start; at < stop; at = ends[ahead++]) {
    prefetch(stream.token(ahead, at), std::min(ends[ahead], stop) - at);
  }
  int64_t written = 0;
  for (; start < stop; ++place) {
    const int64_t take = std::min(ends[place], stop) - start;
    const Token* const from = stream.token(place, start);
    std::copy(from, from + take, out_tokens + written);
    std::fill(out_documents + written, out_documents + written + take, document);
    document += take > 0;
    written += take;
    start += take;
  }
  return {written, document};
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
