// Which of the retrieved documents that a set holds stand in front of a document, epoch by epoch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "jam/philox.h"

namespace jam {

// A document is a row of sequences of the file: its beginning, retrieved ones, the document itself.
// Of the retrieved ones `most` are laid out, or any number up to that, all alike; which ones, and
// in which order, depends on (seed, document). Documents of one or two sequences have none.
class Retrieval {
 public:
  // `borders` are the documents' borders in sequences, `edges` the sequences' in tokens.
  Retrieval(const int64_t* borders, const int64_t* edges, int64_t most, bool drawn)
      : borders_(borders), edges_(edges), most_(most), drawn_(drawn) {}

  // Calls use(from, to) with the file's tokens of the document, slice by slice.
  template <typename Use>
  void lay_out(int64_t seed, int64_t document, Use use) const {
    const int64_t first = borders_[document], last = borders_[document + 1] - 1;
    const auto use_sequence = [&](int64_t i) { use(edges_[i], edges_[i + 1]); };
    if (first <= last) use_sequence(first);
    if (last - first > 1) {
      for (const int64_t each : draw(seed, document, first + 1, last)) use_sequence(each);
    }
    if (first < last) use_sequence(last);
  }

  int64_t length(int64_t seed, int64_t document) const {
    int64_t sum = 0;
    lay_out(seed, document, [&sum](int64_t from, int64_t to) { sum += to - from; });
    return sum;
  }

 private:
  // Some of first .. last - 1, by the beginning of a Fisher-Yates shuffle.
  std::vector<int64_t> draw(int64_t seed, int64_t document, int64_t first, int64_t last) const {
    uint32_t round = 0;
    const auto below = [&](int64_t size) {
      return static_cast<int64_t>(philox_uniform(seed, document, round++) *
                                  static_cast<double>(size));
    };
    std::vector<int64_t> found(last - first);
    std::iota(found.begin(), found.end(), first);
    int64_t number = std::min(most_, last - first);
    if (drawn_) number = below(number + 1);
    for (int64_t i = 0; i < number; ++i) std::swap(found[i], found[i + below(last - first - i)]);
    found.resize(number);
    return found;
  }

  const int64_t* borders_;
  const int64_t* edges_;
  int64_t most_;
  bool drawn_;
};

}  // namespace jam
