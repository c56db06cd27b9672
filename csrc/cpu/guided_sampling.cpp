// Guided sampling on the CPU: rows over threads, ids one after the other.
#include "jam/guided_sampling.h"

#include "cpu/parallel.h"
#include "guided_sampling_call.h"
#include "launchers.h"

namespace jam {
namespace {

template <typename Logit>
int64_t sample_row(const GuidedRow<Logit>& row) {
  if (!row.valid) return kWrongSetting;
  const int64_t end = row.vocabulary;
  const Largest best = largest_logit(row, 0, end);
  if (best.id < 0 || row.greedy) return best.id;
  float floor = 0;
  double mass = mass_above(row, best.logit, floor, 0, end);
  const double nucleus = row.top_p * mass;
  for (uint32_t round = 0;; ++round) {
    const double target = philox_uniform(row.seed, row.offset, round) * mass;
    const int64_t id = find_id(row, best.logit, floor, 0.0, target, 0, end);
    floor = row.weight(id, best.logit);
    mass = mass_above(row, best.logit, floor, 0, end);
    if (mass < nucleus) return id;
  }
}

template <typename Logit>
void sample_rows(const GuidedSampling& op) {
  for_each_row(op.num_rows,
               [&](int64_t row) { op.tokens[row] = sample_row(GuidedRow<Logit>(op, row)); });
}

}  // namespace

at::Tensor guided_sample_cpu(const at::Tensor& cond, const std::optional<at::Tensor>& uncond,
                             const at::Tensor& guidance_scale, const at::Tensor& temperature,
                             const at::Tensor& top_p, const std::optional<at::Tensor>& legal,
                             const at::Tensor& seed, const at::Tensor& offset) {
  const GuidedSamplingCall call(cond, uncond, guidance_scale, temperature, top_p, legal, seed,
                                offset);
  switch (call.op.type) {
    case LogitType::kFloat32:
      sample_rows<float>(call.op);
      break;
    case LogitType::kBFloat16:
      sample_rows<BFloat16>(call.op);
      break;
    case LogitType::kFloat16:
      sample_rows<Float16>(call.op);
      break;
  }
  check_rows(call.tokens);
  return call.tokens;
}

}  // namespace jam
