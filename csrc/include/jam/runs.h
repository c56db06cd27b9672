// Which document each token of a block is of, run by run: a block has a few documents and thousands
// of tokens, and nobody asks for each token's but where documents are kept from one another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace jam {

struct Run {
  int32_t document;
  int32_t stop;  // one past the run's last token; it starts where the run before it stops
};

// Runs in the making; neighbours are of two documents, and none is empty.
class Runs {
 public:
  void append(int32_t document, int64_t count) {
    if (count == 0) return;
    size_ += count;
    if (runs_.empty() || runs_.back().document != document) runs_.push_back({document, 0});
    runs_.back().stop = static_cast<int32_t>(size_);
  }

  int64_t size() const { return size_; }  // in tokens
  int32_t next_document() const { return runs_.empty() ? 0 : runs_.back().document + 1; }
  const std::vector<Run>& all() const { return runs_; }

 private:
  std::vector<Run> runs_;
  int64_t size_ = 0;
};

// The runs of a block that is there; the last ends with the block.
class RunView {
 public:
  RunView(const Run* runs, int64_t count) : runs_(runs), count_(count) {}

  // The run that token `place`, which must be in the block, is of.
  const Run* find(int64_t place) const {
    return std::upper_bound(runs_, runs_ + count_, place,
                            [](int64_t at, const Run& run) { return at < run.stop; });
  }

  void copy(int64_t start, int64_t stop, Runs& out) const {
    if (start == stop) return;
    for (const Run* run = find(start); start < stop; ++run) {
      const int64_t end = std::min<int64_t>(stop, run->stop);
      out.append(run->document, end - start);
      start = end;
    }
  }

  // Whether they are of a block of that many tokens, and as Runs are.
  bool fit(int64_t size) const {
    int64_t start = 0;
    for (const Run* run = runs_; run < runs_ + count_; start = run++->stop) {
      if (run->stop <= start || (run > runs_ && run->document == run[-1].document)) return false;
    }
    return start == size;
  }

 private:
  const Run* runs_;
  int64_t count_;
};

}  // namespace jam
