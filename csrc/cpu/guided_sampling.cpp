// Guided sampling on the CPU: rows over threads, each by the instructions that this CPU has.
#include "cpu/parallel.h"
#include "guided_sampling_call.h"
#include "jam/backend.h"

namespace jam {
namespace {

void sample(const GuidedCall& call, const GuidedDraws& draws) {
  const Backend& own = backend();
  for_each_row(call.rows.num_rows, [&](int64_t row) { own.sample(call.rows, draws, row); });
}

void probabilities(const GuidedCall& call, float* out, int64_t* yielded) {
  const Backend& own = backend();
  for_each_row(call.rows.num_rows, [&](int64_t row) {
    yielded[row] = own.probabilities(call.rows, out + row * call.rows.vocabulary, row);
  });
}

void largest(const GuidedCall& call, float* logits, int64_t* yielded) {
  const Backend& own = backend();
  for_each_row(call.rows.num_rows,
               [&](int64_t row) { yielded[row] = own.largest(call.rows, logits + row, row); });
}

void weights(const GuidedCall& call, const float* largest, float* out, int64_t* yielded) {
  const Backend& own = backend();
  for_each_row(call.rows.num_rows, [&](int64_t row) {
    yielded[row] = own.weights(call.rows, largest[row], out + row * call.rows.vocabulary, row);
  });
}

}  // namespace

const GuidedDevice kGuidedCpu{sample, probabilities, largest, weights};

}  // namespace jam
