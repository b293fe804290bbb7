// Shapes, strides and dtypes of attention_forward and attention_backward without data, symbolic
// sizes included: the same checks as on the devices, and the same strides.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_backward_outputs.h"
#include "attention_checks.h"
#include "attention_layout.h"
#include "attention_operators.h"

namespace torch_ext {
namespace {

ForwardResult attention_forward_meta(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     bool enable_gqa, c10::SymInt /*causal_offset*/,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed, bool contiguous) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed),
                                     .contiguous = contiguous};
  const auto geometry =
      check_attention<c10::SymInt>("attention_forward", arguments, SeedArgument::kRequired);
  return {attention_out(arguments, geometry),
          at::empty_symint(geometry.logsumexp_sizes(),
                           query.options().dtype(accumulate_type(query.scalar_type())))};
}

BackwardResult attention_backward_meta(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, c10::SymInt /*causal_offset*/,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 4> output_mask, bool contiguous) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed),
                                     .contiguous = contiguous};
  const AttentionGradients gradients{.grad_out = grad_out,
                                     .grad_logsumexp = given(grad_logsumexp),
                                     .out = out,
                                     .logsumexp = logsumexp,
                                     .output_mask = output_mask};
  constexpr const char* kOp = "attention_backward";
  const auto geometry = check_attention<c10::SymInt>(kOp, arguments, SeedArgument::kRequired);
  check_attention_gradients(kOp, arguments, gradients, geometry);
  return reduced_gradients(arguments, attention_gradient_outputs(arguments, output_mask, geometry));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_meta));
  m.impl("attention_backward", TORCH_FN(attention_backward_meta));
}

}  // namespace torch_ext
