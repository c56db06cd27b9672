// The operators of guided sampling, for every device: checks, the device's kernels, errors of rows.
#include <c10/util/Exception.h>

#include "guided_sampling_call.h"
#include "launchers.h"

namespace jam {
namespace {

const GuidedDevice& device_of(const GuidedCall& call) {
#ifdef MEGATRON_JAM_CUDA
  if (call.cond.is_cuda()) return kGuidedCuda;
#endif
  (void)call;
  return kGuidedCpu;
}

const char* meaning(int64_t error) {
  switch (error) {
    case kNotFinite:
      return "a logit of a legal id is NaN or +inf";
    case kNothingLegal:
      return "no legal id has a logit above -inf";
    case kWrongRange:
      return "the range of legal ids must be within the vocabulary";
    default:
      return "temperature must be >= 0, top_p in (0, 1], top_k a whole number >= 0, min_p in [0, "
             "1],"
             " and guidance_scale finite";
  }
}

// Raises a ValueError that names the first row which yielded a RowError. On a GPU it waits for it.
void check_rows(const at::Tensor& yielded, bool may_be_empty = false) {
  const at::Tensor host = yielded.is_cpu() ? yielded : yielded.cpu();
  const int64_t* values = host.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < host.size(0); ++row) {
    if (values[row] >= 0 || (may_be_empty && values[row] == kNothingLegal)) continue;
    TORCH_CHECK_VALUE(false, "row ", row, ": ", meaning(values[row]));
  }
}

}  // namespace

GuidedDrawn draw(const GuidedCall& call, GuidedDraws draws, bool truncated) {
  const int64_t num_rows = call.rows.num_rows;
  const GuidedDrawn drawn{call.new_tensor({num_rows}, at::kLong),
                          call.new_tensor({num_rows}, at::kFloat),
                          truncated ? call.new_tensor({num_rows}, at::kFloat) : at::Tensor()};
  draws.tokens = drawn.tokens.mutable_data_ptr<int64_t>();
  draws.log_probability = drawn.log_probability.mutable_data_ptr<float>();
  if (truncated) {
    draws.truncated_log_probability = drawn.truncated_log_probability.mutable_data_ptr<float>();
  }
  device_of(call).sample(call, draws);
  check_rows(drawn.tokens);
  return drawn;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> guided_sample(
    const at::Tensor& cond, const OptionalTensor& uncond, double guidance_scale, double temperature,
    double top_p, int64_t top_k, double min_p, const OptionalTensor& settings, int64_t legal_begin,
    int64_t legal_end, const OptionalTensor& legal, int64_t seed, int64_t offset,
    const OptionalTensor& numbers, bool truncated) {
  const GuidedSettings all{guidance_scale, temperature, top_p, static_cast<double>(top_k), min_p};
  const GuidedCall call({cond, uncond, all, settings, legal_begin, legal_end, legal});
  GuidedDraws draws{};
  draws.seed = seed;
  draws.offset = offset;
  at::Tensor own_numbers;
  if (numbers) {
    own_numbers = call.checked(*numbers, "numbers", 2, at::kLong);
    draws.numbers = own_numbers.const_data_ptr<int64_t>();
  }
  const GuidedDrawn drawn = draw(call, draws, truncated);
  return {drawn.tokens, drawn.log_probability,
          truncated ? drawn.truncated_log_probability : call.new_tensor({0}, at::kFloat)};
}

at::Tensor guided_probabilities(const at::Tensor& cond, const OptionalTensor& uncond,
                                double guidance_scale, double temperature, double top_p,
                                int64_t top_k, double min_p, const OptionalTensor& settings,
                                int64_t legal_begin, int64_t legal_end,
                                const OptionalTensor& legal) {
  const GuidedSettings all{guidance_scale, temperature, top_p, static_cast<double>(top_k), min_p};
  const GuidedCall call({cond, uncond, all, settings, legal_begin, legal_end, legal});
  const at::Tensor out = call.new_tensor({call.rows.num_rows, call.rows.vocabulary}, at::kFloat);
  const at::Tensor yielded = call.new_tensor({call.rows.num_rows}, at::kLong);
  device_of(call).probabilities(call, out.mutable_data_ptr<float>(),
                                yielded.mutable_data_ptr<int64_t>());
  check_rows(yielded);
  return out;
}

std::tuple<at::Tensor, at::Tensor> guided_largest(
    const at::Tensor& cond, const OptionalTensor& uncond, double guidance_scale, double temperature,
    double top_p, int64_t top_k, double min_p, const OptionalTensor& settings, int64_t legal_begin,
    int64_t legal_end, const OptionalTensor& legal) {
  const GuidedSettings all{guidance_scale, temperature, top_p, static_cast<double>(top_k), min_p};
  const GuidedCall call({cond, uncond, all, settings, legal_begin, legal_end, legal});
  const at::Tensor logits = call.new_tensor({call.rows.num_rows}, at::kFloat);
  const at::Tensor ids = call.new_tensor({call.rows.num_rows}, at::kLong);
  device_of(call).largest(call, logits.mutable_data_ptr<float>(), ids.mutable_data_ptr<int64_t>());
  return {logits, ids};
}

at::Tensor guided_weights(const at::Tensor& cond, const OptionalTensor& uncond,
                          double guidance_scale, double temperature, double top_p, int64_t top_k,
                          double min_p, const OptionalTensor& settings, int64_t legal_begin,
                          int64_t legal_end, const OptionalTensor& legal,
                          const at::Tensor& largest) {
  const GuidedSettings all{guidance_scale, temperature, top_p, static_cast<double>(top_k), min_p};
  const GuidedCall call({cond, uncond, all, settings, legal_begin, legal_end, legal});
  const at::Tensor maxima = call.checked(largest, "largest", 1, at::kFloat);
  const at::Tensor out = call.new_tensor({call.rows.num_rows, call.rows.vocabulary}, at::kFloat);
  const at::Tensor yielded = call.new_tensor({call.rows.num_rows}, at::kLong);
  device_of(call).weights(call, maxima.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                          yielded.mutable_data_ptr<int64_t>());
  check_rows(yielded);
  return out;
}

}  // namespace jam
