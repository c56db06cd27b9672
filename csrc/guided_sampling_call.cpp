#include "guided_sampling_call.h"

#include <ATen/EmptyTensor.h>
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
      TORCH_CHECK_VALUE(false, "cond is ", cond.scalar_type(),
                        "; logits must be float32, bfloat16 or float16");
  }
}

// Rows of any stride, with adjacent ids.
at::Tensor checked_rows(const at::Tensor& rows, const char* name, const at::Tensor& cond,
                        at::ScalarType type) {
  TORCH_CHECK_VALUE(rows.sizes() == cond.sizes(), name, " has shape ", rows.sizes(), ", cond ",
                    cond.sizes());
  TORCH_CHECK_VALUE(rows.scalar_type() == type, name, " is ", rows.scalar_type(), "; it must be ",
                    type);
  TORCH_CHECK_VALUE(rows.device() == cond.device(), name, " is on ", rows.device(), ", cond on ",
                    cond.device());
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

}  // namespace

GuidedCall::GuidedCall(const GuidedArguments& arguments) {
  const at::Tensor& given = arguments.cond;
  TORCH_CHECK_VALUE(given.dim() == 2, "cond has shape ", given.sizes(),
                    "; it must be [rows, vocabulary]");
  TORCH_CHECK_VALUE(given.size(1) <= kMaxVocabulary, "cond has ", given.size(1),
                    " ids a row; sums are exact up to ", kMaxVocabulary);
  rows.type = logit_type(given);
  rows.num_rows = given.size(0);
  rows.vocabulary = given.size(1);
  cond = checked_rows(given, "cond", given, given.scalar_type());
  rows.cond = cond.const_data_ptr();
  rows.cond_stride = cond.stride(0);
  if (arguments.uncond) {
    uncond = checked_rows(*arguments.uncond, "uncond", cond, cond.scalar_type());
    rows.uncond = uncond.const_data_ptr();
    rows.uncond_stride = uncond.stride(0);
  }
  rows.settings = arguments.settings;
  if (arguments.row_settings) {
    settings = checked(*arguments.row_settings, "settings", 5, at::kDouble);
    rows.row_settings = reinterpret_cast<const GuidedSettings*>(settings.const_data_ptr<double>());
  }
  rows.legal_begin = arguments.legal_begin;
  rows.legal_end = arguments.legal_end;
  if (!arguments.legal) return;
  if (arguments.legal->scalar_type() == at::kLong) {
    legal = checked(*arguments.legal, "legal", 2, at::kLong);
    rows.legal_ranges = legal.const_data_ptr<int64_t>();
  } else {
    legal = checked_rows(*arguments.legal, "legal", cond, at::kBool);
    rows.legal = legal.const_data_ptr<bool>();
    rows.legal_stride = legal.stride(0);
  }
}

at::Tensor GuidedCall::checked(const at::Tensor& values, const char* name, int64_t columns,
                               at::ScalarType type) const {
  const bool right = columns == 1 ? values.dim() == 1 : values.dim() == 2;
  TORCH_CHECK_VALUE(
      right && values.numel() == rows.num_rows * columns && values.size(0) == rows.num_rows, name,
      " has shape ", values.sizes(), "; it must have ", columns, " for each of ", rows.num_rows,
      " rows");
  TORCH_CHECK_VALUE(values.scalar_type() == type, name, " is ", values.scalar_type(),
                    "; it must be ", type);
  TORCH_CHECK_VALUE(values.device() == cond.device(), name, " is on ", values.device(),
                    ", cond on ", cond.device());
  return values.contiguous();
}

at::Tensor GuidedCall::new_tensor(at::IntArrayRef sizes, at::ScalarType type) const {
  // Without a round through the dispatcher, which costs as much as a short row's draw.
  if (cond.is_cpu()) return at::detail::empty_cpu(sizes, cond.options().dtype(type));
  return at::empty(sizes, cond.options().dtype(type));
}

}  // namespace jam
