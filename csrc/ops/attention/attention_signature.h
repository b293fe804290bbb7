// The one place that spells the arguments of the attention operators out, in the order of their
// schemas (attention_schema.cpp). NAME_kernel<Backend> gathers them for a dispatch key's kernel,
// which is written against AttentionArguments; call_NAME spreads them over the dispatcher.
//
// A new option is a member of AttentionArguments, an entry of its lists, the schemas, and a line in
// each gather and spread here.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <cstdint>
#include <optional>

#include "attention_arguments.h"

namespace torch_ext {

/// The handle of the operator `name`. Signature: that of its kernels.
template <typename Signature>
c10::TypedOperatorHandle<Signature> attention_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::array<c10::SymInt, 2> window_size_of(const AttentionArguments& a) {
  return {a.window_left, a.window_right};
}

// ---- scaled_dot_product_attention

template <typename Backend>
at::Tensor scaled_dot_product_attention_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, c10::SymIntArrayRef window_size, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, bool causal_lower_right) {
  return Backend::attention({.query = &query,
                             .key = &key,
                             .value = &value,
                             .attn_mask = given(attn_mask),
                             .dropout_p = dropout_p,
                             .is_causal = is_causal,
                             .scale = scale,
                             .enable_gqa = enable_gqa,
                             .window_left = window_size[0],
                             .window_right = window_size[1],
                             .softcap = softcap,
                             .alibi_slopes = given(alibi_slopes),
                             .sink = given(sink),
                             .causal_lower_right = causal_lower_right});
}

inline at::Tensor call_scaled_dot_product_attention(const AttentionArguments& a) {
  static const auto op = attention_operator<decltype(scaled_dot_product_attention_kernel<void>)>(
      "torch_ext::scaled_dot_product_attention");
  return op.call(*a.query, *a.key, *a.value, optional(a.attn_mask), a.dropout_p, a.is_causal,
                 a.scale, a.enable_gqa, window_size_of(a), a.softcap, optional(a.alibi_slopes),
                 optional(a.sink), a.causal_lower_right);
}

// ---- attention_with_logsumexp

template <typename Backend>
ForwardResult attention_with_logsumexp_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, c10::SymInt causal_offset, const OptionalTensor& key_padding_mask,
    const OptionalTensor& dropout_seed, c10::SymIntArrayRef window_size, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, bool causal_lower_right) {
  return Backend::attention_with_logsumexp({.query = &query,
                                            .key = &key,
                                            .value = &value,
                                            .attn_mask = given(attn_mask),
                                            .dropout_p = dropout_p,
                                            .is_causal = is_causal,
                                            .scale = scale,
                                            .enable_gqa = enable_gqa,
                                            .causal_offset = std::move(causal_offset),
                                            .key_padding_mask = given(key_padding_mask),
                                            .dropout_seed = given(dropout_seed),
                                            .window_left = window_size[0],
                                            .window_right = window_size[1],
                                            .softcap = softcap,
                                            .alibi_slopes = given(alibi_slopes),
                                            .sink = given(sink),
                                            .causal_lower_right = causal_lower_right});
}

// ---- attention_forward

template <typename Backend>
ForwardResult attention_forward_kernel(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, c10::SymInt causal_offset, const OptionalTensor& key_padding_mask,
    const OptionalTensor& dropout_seed, bool contiguous, c10::SymIntArrayRef window_size,
    double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
    bool causal_lower_right) {
  return Backend::forward({.query = &query,
                           .key = &key,
                           .value = &value,
                           .attn_mask = given(attn_mask),
                           .dropout_p = dropout_p,
                           .is_causal = is_causal,
                           .scale = scale,
                           .enable_gqa = enable_gqa,
                           .causal_offset = std::move(causal_offset),
                           .key_padding_mask = given(key_padding_mask),
                           .dropout_seed = given(dropout_seed),
                           .contiguous = contiguous,
                           .window_left = window_size[0],
                           .window_right = window_size[1],
                           .softcap = softcap,
                           .alibi_slopes = given(alibi_slopes),
                           .sink = given(sink),
                           .causal_lower_right = causal_lower_right});
}

inline ForwardResult call_attention_forward(const AttentionArguments& a) {
  static const auto op =
      attention_operator<decltype(attention_forward_kernel<void>)>("torch_ext::attention_forward");
  return op.call(*a.query, *a.key, *a.value, optional(a.attn_mask), a.dropout_p, a.is_causal,
                 a.scale, a.enable_gqa, a.causal_offset, optional(a.key_padding_mask),
                 optional(a.dropout_seed), a.contiguous, window_size_of(a), a.softcap,
                 optional(a.alibi_slopes), optional(a.sink), a.causal_lower_right);
}

// ---- attention_backward

template <typename Backend>
BackwardResult attention_backward_kernel(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, c10::SymInt causal_offset,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    GradientSet output_mask, bool contiguous, c10::SymIntArrayRef window_size, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, bool causal_lower_right) {
  return Backend::backward({.query = &query,
                            .key = &key,
                            .value = &value,
                            .attn_mask = given(attn_mask),
                            .dropout_p = dropout_p,
                            .is_causal = is_causal,
                            .scale = scale,
                            .enable_gqa = enable_gqa,
                            .causal_offset = std::move(causal_offset),
                            .key_padding_mask = given(key_padding_mask),
                            .dropout_seed = given(dropout_seed),
                            .contiguous = contiguous,
                            .window_left = window_size[0],
                            .window_right = window_size[1],
                            .softcap = softcap,
                            .alibi_slopes = given(alibi_slopes),
                            .sink = given(sink),
                            .causal_lower_right = causal_lower_right},
                           {.grad_out = &grad_out,
                            .grad_logsumexp = given(grad_logsumexp),
                            .out = &out,
                            .logsumexp = &logsumexp,
                            .output_mask = output_mask});
}

inline BackwardResult call_attention_backward(const AttentionArguments& a,
                                              const AttentionGradients& g) {
  static const auto op = attention_operator<decltype(attention_backward_kernel<void>)>(
      "torch_ext::attention_backward");
  return op.call(*g.grad_out, optional(g.grad_logsumexp), *a.query, *a.key, *a.value, *g.out,
                 *g.logsumexp, optional(a.attn_mask), a.dropout_p, a.is_causal, a.scale,
                 a.enable_gqa, a.causal_offset, optional(a.key_padding_mask),
                 optional(a.dropout_seed), g.output_mask, a.contiguous, window_size_of(a),
                 a.softcap, optional(a.alibi_slopes), optional(a.sink), a.causal_lower_right);
}

// ---- packed_attention_forward and packed_attention_backward. Arguments come without query, key
// and value.

template <typename Backend>
ForwardResult packed_attention_forward_kernel(
    const at::Tensor& qkv, std::int64_t num_heads, const OptionalTensor& attn_mask,
    double dropout_p, bool is_causal, const OptionalTensor& key_padding_mask,
    const OptionalTensor& dropout_seed, c10::SymIntArrayRef window_size, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, bool causal_lower_right) {
  return Backend::packed_forward({.qkv = &qkv, .num_heads = num_heads},
                                 {.attn_mask = given(attn_mask),
                                  .dropout_p = dropout_p,
                                  .is_causal = is_causal,
                                  .key_padding_mask = given(key_padding_mask),
                                  .dropout_seed = given(dropout_seed),
                                  .window_left = window_size[0],
                                  .window_right = window_size[1],
                                  .softcap = softcap,
                                  .alibi_slopes = given(alibi_slopes),
                                  .sink = given(sink),
                                  .causal_lower_right = causal_lower_right});
}

inline ForwardResult call_packed_attention_forward(const PackedProjection& packed,
                                                   const AttentionArguments& a) {
  static const auto op = attention_operator<decltype(packed_attention_forward_kernel<void>)>(
      "torch_ext::packed_attention_forward");
  return op.call(*packed.qkv, packed.num_heads, optional(a.attn_mask), a.dropout_p, a.is_causal,
                 optional(a.key_padding_mask), optional(a.dropout_seed), window_size_of(a),
                 a.softcap, optional(a.alibi_slopes), optional(a.sink), a.causal_lower_right);
}

/// output_mask: of qkv, which stands for query, key and value, of attn_mask, and of sink.
template <typename Backend>
PackedBackwardResult packed_attention_backward_kernel(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, kGradientCount - 2> output_mask, c10::SymIntArrayRef window_size,
    double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
    bool causal_lower_right) {
  return Backend::packed_backward({.qkv = &qkv, .num_heads = num_heads},
                                  {.attn_mask = given(attn_mask),
                                   .dropout_p = dropout_p,
                                   .is_causal = is_causal,
                                   .key_padding_mask = given(key_padding_mask),
                                   .dropout_seed = given(dropout_seed),
                                   .window_left = window_size[0],
                                   .window_right = window_size[1],
                                   .softcap = softcap,
                                   .alibi_slopes = given(alibi_slopes),
                                   .sink = given(sink),
                                   .causal_lower_right = causal_lower_right},
                                  {.grad_out = &grad_out,
                                   .grad_logsumexp = given(grad_logsumexp),
                                   .out = &out,
                                   .logsumexp = &logsumexp,
                                   .output_mask = {output_mask[0], output_mask[0], output_mask[0],
                                                   output_mask[1], output_mask[2]}});
}

inline PackedBackwardResult call_packed_attention_backward(const PackedProjection& packed,
                                                           const AttentionArguments& a,
                                                           const AttentionGradients& g) {
  static const auto op = attention_operator<decltype(packed_attention_backward_kernel<void>)>(
      "torch_ext::packed_attention_backward");
  return op.call(*g.grad_out, optional(g.grad_logsumexp), *packed.qkv, packed.num_heads, *g.out,
                 *g.logsumexp, optional(a.attn_mask), a.dropout_p, a.is_causal,
                 optional(a.key_padding_mask), optional(a.dropout_seed),
                 {g.output_mask[kQuery], g.output_mask[kMask], g.output_mask[kSink]},
                 window_size_of(a), a.softcap, optional(a.alibi_slopes), optional(a.sink),
                 a.causal_lower_right);
}

// ---- self_attention. Arguments come without query, key and value.

template <typename Backend>
at::Tensor self_attention_kernel(
    const at::Tensor& input, const at::Tensor& in_proj_weight, const OptionalTensor& in_proj_bias,
    const at::Tensor& out_proj_weight, const OptionalTensor& out_proj_bias, std::int64_t num_heads,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, c10::SymIntArrayRef window_size, double softcap,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sink, bool causal_lower_right) {
  return Backend::self_attention({.input = &input,
                                  .in_proj_weight = &in_proj_weight,
                                  .in_proj_bias = given(in_proj_bias),
                                  .out_proj_weight = &out_proj_weight,
                                  .out_proj_bias = given(out_proj_bias),
                                  .num_heads = num_heads},
                                 {.attn_mask = given(attn_mask),
                                  .dropout_p = dropout_p,
                                  .is_causal = is_causal,
                                  .key_padding_mask = given(key_padding_mask),
                                  .window_left = window_size[0],
                                  .window_right = window_size[1],
                                  .softcap = softcap,
                                  .alibi_slopes = given(alibi_slopes),
                                  .sink = given(sink),
                                  .causal_lower_right = causal_lower_right});
}

inline at::Tensor call_self_attention(const SelfAttentionParameters& p,
                                      const AttentionArguments& a) {
  static const auto op =
      attention_operator<decltype(self_attention_kernel<void>)>("torch_ext::self_attention");
  return op.call(*p.input, *p.in_proj_weight, optional(p.in_proj_bias), *p.out_proj_weight,
                 optional(p.out_proj_bias), p.num_heads, optional(a.attn_mask), a.dropout_p,
                 a.is_causal, optional(a.key_padding_mask), window_size_of(a), a.softcap,
                 optional(a.alibi_slopes), optional(a.sink), a.causal_lower_right);
}

// ---- attention_dropout_mask

inline at::Tensor call_attention_dropout_mask(const at::Tensor& dropout_seed, double dropout_p,
                                              c10::SymIntArrayRef sizes) {
  static const auto op = attention_operator<decltype(call_attention_dropout_mask)>(
      "torch_ext::attention_dropout_mask");
  return op.call(dropout_seed, dropout_p, sizes);
}

}  // namespace torch_ext
