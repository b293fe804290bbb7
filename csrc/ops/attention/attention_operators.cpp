#include "attention_operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace torch_ext {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor call_scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& value,
                                             const OptionalTensor& attn_mask, double dropout_p,
                                             bool is_causal, std::optional<double> scale,
                                             bool enable_gqa) {
  static const auto op =
      find<decltype(call_scaled_dot_product_attention)>("torch_ext::scaled_dot_product_attention");
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
}

// The dispatcher's signatures take SymInt by value.
ForwardResult call_attention_forward(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     bool enable_gqa, const c10::SymInt& causal_offset,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed, bool contiguous) {
  using Signature = ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  const OptionalTensor&, double, bool, std::optional<double>, bool,
                                  c10::SymInt, const OptionalTensor&, const OptionalTensor&, bool);
  static const auto op = find<Signature>("torch_ext::attention_forward");
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                 causal_offset, key_padding_mask, dropout_seed, contiguous);
}

BackwardResult call_attention_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, const c10::SymInt& causal_offset,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 4> output_mask, bool contiguous) {
  using Signature =
      BackwardResult(const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                     const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                     double, bool, std::optional<double>, bool, c10::SymInt, const OptionalTensor&,
                     const OptionalTensor&, std::array<bool, 4>, bool);
  static const auto op = find<Signature>("torch_ext::attention_backward");
  return op.call(grad_out, grad_logsumexp, query, key, value, out, logsumexp, attn_mask, dropout_p,
                 is_causal, scale, enable_gqa, causal_offset, key_padding_mask, dropout_seed,
                 output_mask, contiguous);
}

at::Tensor call_attention_dropout_mask(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes) {
  static const auto op =
      find<decltype(call_attention_dropout_mask)>("torch_ext::attention_dropout_mask");
  return op.call(dropout_seed, dropout_p, sizes);
}

ForwardResult call_packed_attention_forward(const at::Tensor& qkv, std::int64_t num_heads,
                                            const OptionalTensor& attn_mask, double dropout_p,
                                            bool is_causal, const OptionalTensor& key_padding_mask,
                                            const OptionalTensor& dropout_seed) {
  static const auto op =
      find<decltype(call_packed_attention_forward)>("torch_ext::packed_attention_forward");
  return op.call(qkv, num_heads, attn_mask, dropout_p, is_causal, key_padding_mask, dropout_seed);
}

PackedBackwardResult call_packed_attention_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask) {
  static const auto op =
      find<decltype(call_packed_attention_backward)>("torch_ext::packed_attention_backward");
  return op.call(grad_out, grad_logsumexp, qkv, num_heads, out, logsumexp, attn_mask, dropout_p,
                 is_causal, key_padding_mask, dropout_seed, output_mask);
}

at::Tensor call_self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                               const OptionalTensor& in_proj_bias,
                               const at::Tensor& out_proj_weight,
                               const OptionalTensor& out_proj_bias, std::int64_t num_heads,
                               const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                               const OptionalTensor& key_padding_mask) {
  static const auto op = find<decltype(call_self_attention)>("torch_ext::self_attention");
  return op.call(input, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads,
                 attn_mask, dropout_p, is_causal, key_padding_mask);
}

}  // namespace torch_ext
