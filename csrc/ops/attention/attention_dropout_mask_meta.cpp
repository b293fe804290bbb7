// torch_ext::attention_dropout_mask without data.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_checks.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "attention_dropout_mask";

at::Tensor attention_dropout_mask_meta(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes) {
  check_dropout_p(kOp, dropout_p);
  check_dropout_seed(kOp, &dropout_seed, dropout_seed.device());
  check_score_sizes(kOp, sizes.size());
  return at::empty_symint(sizes, dropout_seed.options().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl(kOp, TORCH_FN(attention_dropout_mask_meta)); }

}  // namespace torch_ext
