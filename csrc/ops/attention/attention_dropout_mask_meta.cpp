// torch_ext::attention_dropout_mask without data.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_checks.h"

namespace torch_ext {
namespace {

constexpr const char* kMaskOp = "attention_dropout_mask";

at::Tensor attention_dropout_mask_meta(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes) {
  check_dropout_p(kMaskOp, dropout_p);
  check_dropout_seed(kMaskOp, &dropout_seed, dropout_seed.device());
  check_score_sizes(kMaskOp, sizes.size());
  return at::empty_symint(sizes, dropout_seed.options().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl(kMaskOp, TORCH_FN(attention_dropout_mask_meta)); }

}  // namespace torch_ext
