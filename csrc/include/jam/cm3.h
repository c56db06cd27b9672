// The CM3 objective on a block of packed documents: spans are moved to the end of the block, or of
// their document. megatron_jam/data/cm3_reference.py is the specification, to the bit.
//
// A plan says which tokens are read and which of them move; it is drawn first, so that a block of
// which nothing moves need not be copied.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "jam/for_each_cpu.h"
#include "jam/philox.h"
#include "jam/runs.h"

namespace jam {

enum class Cm3Scope { kBlock, kAuthors, kDocument };

struct Cm3Settings {
  double mean_spans;
  int64_t max_spans;  // not above the number of sentinels
  double mask_whole_caption;
  Cm3Scope scope;
};

struct Cm3Vocabulary {
  int32_t pad, eos, break_, eoss, first_sentinel;
  int8_t text, image;            // values in modality
  std::vector<int8_t> modality;  // of each id
};

struct Span {
  int64_t start, end;
  int64_t size() const { return end - start; }
};

// The draws of a block, in order.
class Cm3Uniforms {
 public:
  Cm3Uniforms(int64_t seed, int64_t index) : seed_(seed), index_(index) {}
  double next() { return philox_uniform(seed_, index_, round_++); }
  // Uniform over 0 .. size - 1.
  int64_t below(int64_t size) { return static_cast<int64_t>(next() * static_cast<double>(size)); }

 private:
  int64_t seed_, index_;
  uint32_t round_ = 0;
};

// A place of [from, end) up to which none of three ids stands: close before the first that does.
JAM_FOR_EACH_CPU static int64_t skip_others(const int32_t* tokens, int64_t from, int64_t end,
                                            int32_t a, int32_t b, int32_t c) {
  constexpr int64_t kAtOnce = 64;  // without a branch inside, so that it is vectorised
  for (; from + kAtOnce <= end; from += kAtOnce) {
    int32_t found = 0;
    for (int64_t i = 0; i < kAtOnce; ++i) {
      const int32_t token = tokens[from + i];
      found |= (token == a) | (token == b) | (token == c);
    }
    if (found) break;
  }
  return from;
}

// Runs of tokens without borders.
class Segments {
 public:
  Segments(const int32_t* tokens, int64_t size, int32_t border_a, int32_t border_b,
           int32_t border_c)
      : tokens_(tokens), size_(size), a_(border_a), b_(border_b), c_(border_c) {}

  // The first run within [from, end); empty at `end` if there is none.
  Span next(int64_t from, int64_t end) const {
    while (from < end && is_border(tokens_[from])) ++from;
    return {from, find_border(from, end)};
  }

  // The longest run within the span, the first of equals.
  Span longest(Span span) const {
    Span best{span.start, span.start};
    for (int64_t from = span.start; from < span.end;) {
      const Span run = next(from, span.end);
      if (run.size() > best.size()) best = run;
      from = run.end;
    }
    return best;
  }

  // Whether `count` tokens or more are no borders.
  bool has(int64_t count) const {
    for (int64_t place = 0; place < size_ && count > 0; ++place)
      count -= !is_border(tokens_[place]);
    return count <= 0;
  }

  // Which places are no borders.
  std::vector<int64_t> places() const {
    std::vector<int64_t> found;
    for (int64_t place = 0; place < size_; ++place) {
      if (!is_border(tokens_[place])) found.push_back(place);
    }
    return found;
  }

  int64_t size() const { return size_; }

 private:
  bool is_border(int32_t token) const { return token == a_ || token == b_ || token == c_; }

  int64_t find_border(int64_t from, int64_t end) const {
    from = skip_others(tokens_, from, end, a_, b_, c_);
    while (from < end && !is_border(tokens_[from])) ++from;
    return from;
  }

  const int32_t* tokens_;
  int64_t size_;
  int32_t a_, b_, c_;
};

// What becomes of a block, or in scope `document` of one of its documents.
struct Cm3Piece {
  int64_t start, stop;      // which tokens of the block are read
  std::vector<Span> spans;  // of them, from `start` on; in order, disjoint, not empty
};

class Cm3 {
 public:
  Cm3(const Cm3Settings& settings, Cm3Vocabulary vocabulary)
      : settings_(settings), vocabulary_(std::move(vocabulary)) {}

  std::vector<Cm3Piece> plan(const int32_t* tokens, const RunView& runs, int64_t length,
                             int64_t seed, int64_t index) const {
    Cm3Uniforms uniforms(seed, index);
    int64_t content = length;
    while (content > 0 && tokens[content - 1] == vocabulary_.pad) --content;
    std::vector<Cm3Piece> pieces;
    int64_t room = length;
    for (int64_t start = 0, stop; start < content && room > 0; start = stop) {
      stop = content;
      if (settings_.scope == Cm3Scope::kDocument) {
        stop = std::min<int64_t>(content, runs.find(start)->stop);
      }
      std::vector<Span> spans = choose(tokens + start, stop - start, room, uniforms);
      const int64_t size = read_size(stop - start, room, spans.size());
      room -= size + 3 * static_cast<int64_t>(spans.size());
      pieces.push_back({start, start + size, std::move(spans)});
    }
    return pieces;
  }

  // Carries out a plan: `length` tokens, of the documents that are appended to `out_runs`. Returns
  // how many tokens it does not read.
  int64_t carry_out(const std::vector<Cm3Piece>& pieces, const int32_t* tokens, const RunView& runs,
                    int64_t length, int32_t* out_tokens, Runs& out_runs) const {
    int64_t content = length, num_read = 0;
    while (content > 0 && tokens[content - 1] == vocabulary_.pad) --content;
    Writer out{tokens, runs, out_tokens, out_runs};
    for (const Cm3Piece& piece : pieces) {
      const bool closes = settings_.scope == Cm3Scope::kDocument && !piece.spans.empty() &&
                          tokens[piece.stop - 1] == vocabulary_.eos;
      move(piece.start, piece.stop - closes, piece.spans, out);
      if (closes) out.copy(piece.stop - 1, piece.stop);
      num_read += piece.stop - piece.start;
    }
    const int64_t room = length - out_runs.size();
    std::fill(out_tokens + length - room, out_tokens + length, vocabulary_.pad);
    out_runs.append(content ? runs.find(content - 1)->document + 1 : 0, room);
    return content - num_read;
  }

 private:
  // Draws of all ends before single tokens are taken.
  static constexpr int kMaxDraws = 64;

  // Where a block and its documents are read, and where another is written, front to back.
  struct Writer {
    const int32_t* tokens;
    const RunView& runs;
    int32_t* out_tokens;
    Runs& out_runs;

    void copy(int64_t start, int64_t stop) {
      std::copy(tokens + start, tokens + stop, out_tokens + out_runs.size());
      runs.copy(start, stop, out_runs);
    }

    // A token that goes with the block's token `owner`.
    void put(int32_t token, int64_t owner) {
      out_tokens[out_runs.size()] = token;
      runs.copy(owner, owner + 1, out_runs);
    }
  };

  // How many of a piece's tokens are read if k spans of it move: each adds two sentinels and
  // <eoss>.
  static int64_t read_size(int64_t size, int64_t room, int64_t k) {
    return std::max<int64_t>(0, std::min(size, room - 3 * k));
  }

  Segments segments(const int32_t* tokens, int64_t size) const {
    const bool across = settings_.scope == Cm3Scope::kAuthors;
    return {tokens, size, vocabulary_.break_, vocabulary_.pad,
            across ? vocabulary_.pad : vocabulary_.eos};
  }

  std::vector<Span> choose(const int32_t* tokens, int64_t size, int64_t room,
                           Cm3Uniforms& uniforms) const {
    if (uniforms.next() < settings_.mask_whole_caption) {
      const std::vector<Span> found = captions(tokens, read_size(size, room, 1));
      if (!found.empty()) return {found[uniforms.below(static_cast<int64_t>(found.size()))]};
    }
    for (int64_t k = draw_num_spans(uniforms); k > 0; --k) {
      const Segments runs = segments(tokens, read_size(size, room, k));
      if (runs.has(k)) return draw_spans(k, runs, uniforms);
    }
    return {};
  }

  // Poisson, by inversion of one uniform number.
  int64_t draw_num_spans(Cm3Uniforms& uniforms) const {
    const double uniform = uniforms.next();
    double probability = std::exp(-settings_.mean_spans), cumulated = probability;
    int64_t k = 0;
    while (uniform >= cumulated && k < settings_.max_spans) {
      ++k;
      probability *= settings_.mean_spans / static_cast<double>(k);
      cumulated += probability;
    }
    return k;
  }

  std::vector<Span> draw_spans(int64_t k, const Segments& runs, Cm3Uniforms& uniforms) const {
    std::vector<int64_t> ends(2 * k);
    std::vector<Span> spans(k);
    for (int draw = 0; draw < kMaxDraws; ++draw) {
      for (int64_t& end : ends) end = uniforms.below(runs.size() + 1);
      std::sort(ends.begin(), ends.end());
      bool whole = true;
      for (int64_t i = 0; i < k; ++i) {
        spans[i] = runs.longest({ends[2 * i], ends[2 * i + 1]});
        whole = whole && spans[i].size() > 0;
      }
      if (whole) return spans;
    }
    return draw_tokens(k, runs.places(), uniforms);
  }

  // k single tokens of `places`, each as likely (Floyd's algorithm).
  static std::vector<Span> draw_tokens(int64_t k, const std::vector<int64_t>& places,
                                       Cm3Uniforms& uniforms) {
    std::vector<int64_t> chosen;
    for (int64_t last = static_cast<int64_t>(places.size()) - k;
         last < static_cast<int64_t>(places.size()); ++last) {
      const int64_t drawn = uniforms.below(last + 1);
      const bool taken = std::find(chosen.begin(), chosen.end(), drawn) != chosen.end();
      chosen.push_back(taken ? last : drawn);
    }
    std::sort(chosen.begin(), chosen.end());
    std::vector<Span> spans;
    for (const int64_t number : chosen) spans.push_back({places[number], places[number] + 1});
    return spans;
  }

  std::vector<Span> captions(const int32_t* tokens, int64_t size) const {
    const Segments runs(tokens, size, vocabulary_.break_, vocabulary_.pad, vocabulary_.eos);
    std::vector<Span> found;
    for (int64_t from = 0; from < size;) {
      const Span run = runs.next(from, size);
      from = run.end;
      if (run.size() > 0 && run.start > 0 && run.end + 1 < size &&
          tokens[run.end] == vocabulary_.break_ && is_of(tokens[run.end + 1], vocabulary_.image) &&
          is_text(tokens, run)) {
        found.push_back(run);
      }
    }
    return found;
  }

  bool is_of(int32_t token, int8_t modality) const {
    return token >= 0 && token < static_cast<int64_t>(vocabulary_.modality.size()) &&
           vocabulary_.modality[token] == modality;
  }

  bool is_text(const int32_t* tokens, Span run) const {
    return std::all_of(tokens + run.start, tokens + run.end,
                       [this](int32_t token) { return is_of(token, vocabulary_.text); });
  }

  // Writes the block's tokens [start, stop) with sentinels, then the spans, counted from `start`.
  void move(int64_t start, int64_t stop, const std::vector<Span>& spans, Writer& out) const {
    int64_t done = start;
    int32_t sentinel = vocabulary_.first_sentinel;
    for (const Span& span : spans) {
      out.copy(done, start + span.start);
      out.put(sentinel++, start + span.start);
      done = start + span.end;
    }
    out.copy(done, stop);
    sentinel = vocabulary_.first_sentinel;
    for (const Span& span : spans) {
      out.put(sentinel++, start + span.start);
      out.copy(start + span.start, start + span.end);
      out.put(vocabulary_.eoss, start + span.end - 1);
    }
  }

  Cm3Settings settings_;
  Cm3Vocabulary vocabulary_;
};

}  // namespace jam
