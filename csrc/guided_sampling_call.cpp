#include "guided_sampling_call.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

namespace jam {
namespace {

LogitType logit_type(const at::Tensor& cond) {
  switch (cond.scalar_type()) {
    case at::kFloat:
      return LogitType::kFloat32;
    case at::kBFloat16:
      return LogitType::kBFloat16;
    case at::kHalf:
      return LogitType::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, "guided_sample: cond is ", cond.scalar_type(),
                        "; logits must be float32, bfloat16 or float16");
  }
}

// Rows of any stride, with adjacent ids.
at::Tensor checked_rows(const at::Tensor& rows, const char* name, const at::Tensor& cond,
                        at::ScalarType type) {
  TORCH_CHECK_VALUE(rows.sizes() == cond.sizes(), "guided_sample: ", name, " has shape ",
                    rows.sizes(), ", cond ", cond.sizes());
  TORCH_CHECK_VALUE(rows.scalar_type() == type, "guided_sample: ", name, " is ", rows.scalar_type(),
                    "; it must be ", type);
  TORCH_CHECK_VALUE(rows.device() == cond.device(), "guided_sample: ", name, " is on ",
                    rows.device(), ", cond on ", cond.device());
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

at::Tensor checked_setting(const at::Tensor& setting, const char* name, const at::Tensor& cond,
                           at::ScalarType type) {
  TORCH_CHECK_VALUE(setting.dim() == 1 && setting.size(0) == cond.size(0), "guided_sample: ", name,
                    " has shape ", setting.sizes(), "; it must have one value for each of ",
                    cond.size(0), " rows");
  TORCH_CHECK_VALUE(setting.scalar_type() == type, "guided_sample: ", name, " is ",
                    setting.scalar_type(), "; it must be ", type);
  TORCH_CHECK_VALUE(setting.device() == cond.device(), "guided_sample: ", name, " is on ",
                    setting.device(), ", cond on ", cond.device());
  return setting.contiguous();
}

const char* meaning(int64_t error) {
  switch (error) {
    case kNotFinite:
      return "a logit of a legal id is NaN or +inf";
    case kNothingLegal:
      return "no legal id has a logit above -inf";
    default:
      return "temperature must be >= 0, top_p in (0, 1], and guidance_scale finite";
  }
}

}  // namespace

GuidedSamplingCall::GuidedSamplingCall(const at::Tensor& cond_,
                                       const std::optional<at::Tensor>& uncond_,
                                       const at::Tensor& guidance_scale_,
                                       const at::Tensor& temperature_, const at::Tensor& top_p_,
                                       const std::optional<at::Tensor>& legal_,
                                       const at::Tensor& seed_, const at::Tensor& offset_) {
  TORCH_CHECK_VALUE(cond_.dim() == 2, "guided_sample: cond has shape ", cond_.sizes(),
                    "; it must be [rows, vocabulary]");
  TORCH_CHECK_VALUE(cond_.size(1) <= kMaxVocabulary, "guided_sample: cond has ", cond_.size(1),
                    " ids a row; sums are exact up to ", kMaxVocabulary);
  op.type = logit_type(cond_);
  cond = checked_rows(cond_, "cond", cond_, cond_.scalar_type());
  if (uncond_) uncond = checked_rows(*uncond_, "uncond", cond_, cond_.scalar_type());
  if (legal_) legal = checked_rows(*legal_, "legal", cond_, at::kBool);
  guidance_scale = checked_setting(guidance_scale_, "guidance_scale", cond_, at::kDouble);
  temperature = checked_setting(temperature_, "temperature", cond_, at::kDouble);
  top_p = checked_setting(top_p_, "top_p", cond_, at::kDouble);
  seed = checked_setting(seed_, "seed", cond_, at::kLong);
  offset = checked_setting(offset_, "offset", cond_, at::kLong);
  tokens = at::empty({cond.size(0)}, cond.options().dtype(at::kLong));

  op.num_rows = cond.size(0);
  op.vocabulary = cond.size(1);
  op.cond = cond.const_data_ptr();
  op.cond_stride = cond.stride(0);
  op.uncond = uncond_ ? uncond.const_data_ptr() : nullptr;
  op.uncond_stride = uncond_ ? uncond.stride(0) : 0;
  op.legal = legal_ ? legal.const_data_ptr<bool>() : nullptr;
  op.legal_stride = legal_ ? legal.stride(0) : 0;
  op.guidance_scale = guidance_scale.const_data_ptr<double>();
  op.temperature = temperature.const_data_ptr<double>();
  op.top_p = top_p.const_data_ptr<double>();
  op.seed = seed.const_data_ptr<int64_t>();
  op.offset = offset.const_data_ptr<int64_t>();
  op.tokens = tokens.mutable_data_ptr<int64_t>();
}

void check_rows(const at::Tensor& tokens) {
  const at::Tensor host = tokens.cpu();
  const int64_t* ids = host.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < host.size(0); ++row) {
    TORCH_CHECK_VALUE(ids[row] >= 0, "guided_sample: row ", row, ": ", meaning(ids[row]));
  }
}

}  // namespace jam
