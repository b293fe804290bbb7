// Shapes of packed_attention_forward and packed_attention_backward without data.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/SymbolicShapeMeta.h>
#include <torch/library.h>

#include "attention_backward_outputs.h"
#include "packed_attention.h"

namespace torch_ext {
namespace {

ForwardResult packed_attention_forward_meta(const at::Tensor& qkv, std::int64_t num_heads,
                                            const OptionalTensor& attn_mask, double dropout_p,
                                            bool is_causal, const OptionalTensor& key_padding_mask,
                                            const OptionalTensor& dropout_seed) {
  constexpr const char* kOp = "packed_attention_forward";
  const auto geometry = check_packed_qkv<c10::SymInt>(kOp, qkv, num_heads);
  const AttentionArguments arguments{.query = qkv,
                                     .key = qkv,
                                     .value = qkv,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed)};
  check_attention_options(kOp, arguments, geometry, SeedArgument::kRequired);
  c10::SymDimVector sizes(qkv.sym_sizes().begin(), qkv.sym_sizes().end());
  sizes.back() = geometry.head_dim * num_heads;
  return {at::empty_symint(sizes, qkv.options()),
          at::empty_symint(geometry.logsumexp_sizes(),
                           qkv.options().dtype(accumulate_type(qkv.scalar_type())))};
}

PackedBackwardResult packed_attention_backward_meta(
    const at::Tensor& grad_out, const OptionalTensor& /*grad_logsumexp*/, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& /*logsumexp*/,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask) {
  constexpr const char* kOp = "packed_attention_backward";
  const auto geometry = check_packed_qkv<c10::SymInt>(kOp, qkv, num_heads);
  check_packed_out(kOp, "grad_out", grad_out, qkv, /*any_type=*/true);
  check_packed_out(kOp, "out", out, qkv, /*any_type=*/false);
  const AttentionArguments arguments{.query = qkv,
                                     .key = qkv,
                                     .value = qkv,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed)};
  check_attention_options(kOp, arguments, geometry, SeedArgument::kRequired);
  const AttentionGradientOutputs outputs =
      attention_gradient_outputs(arguments, {false, false, false, output_mask[1]}, geometry);
  at::Tensor grad_qkv;
  if (output_mask[0]) grad_qkv = at::empty_like(qkv);
  return {grad_qkv, mask_gradient(arguments, outputs)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("packed_attention_forward", TORCH_FN(packed_attention_forward_meta));
  m.impl("packed_attention_backward", TORCH_FN(packed_attention_backward_meta));
}

}  // namespace torch_ext
