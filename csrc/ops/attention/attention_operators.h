// The operators of this folder as typed functions. Each call goes through the dispatcher; the
// handle is looked up once per process.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "attention_arguments.h"

namespace torch_ext {

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, logsumexp
// of query, key, value, attn_mask; undefined where not asked for
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PackedBackwardResult = std::tuple<at::Tensor, at::Tensor>;  // of qkv, attn_mask

at::Tensor call_scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& value,
                                             const OptionalTensor& attn_mask, double dropout_p,
                                             bool is_causal, std::optional<double> scale,
                                             bool enable_gqa);

ForwardResult call_attention_forward(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     bool enable_gqa, const c10::SymInt& causal_offset,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed, bool contiguous);

BackwardResult call_attention_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, const c10::SymInt& causal_offset,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 4> output_mask, bool contiguous);

at::Tensor call_attention_dropout_mask(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes);

ForwardResult call_packed_attention_forward(const at::Tensor& qkv, std::int64_t num_heads,
                                            const OptionalTensor& attn_mask, double dropout_p,
                                            bool is_causal, const OptionalTensor& key_padding_mask,
                                            const OptionalTensor& dropout_seed);

PackedBackwardResult call_packed_attention_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask);

at::Tensor call_self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                               const OptionalTensor& in_proj_bias,
                               const at::Tensor& out_proj_weight,
                               const OptionalTensor& out_proj_bias, std::int64_t num_heads,
                               const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                               const OptionalTensor& key_padding_mask);

}  // namespace torch_ext
