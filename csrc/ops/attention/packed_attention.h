// Attention over a packed projection: qkv is (batch, seq, 3 * embed) or (seq, 3 * embed), with
// query, key and value one behind the other, each (num_heads, head_dim) in itself.
#pragma once

#include "attention_arguments.h"
#include "attention_checks.h"
#include "attention_operators.h"

namespace torch_ext {

/// Checks qkv and num_heads.
template <typename Int>
AttentionGeometry<Int> check_packed_qkv(const char* op, const at::Tensor& qkv,
                                        std::int64_t num_heads);

extern template AttentionGeometry<std::int64_t> check_packed_qkv(const char*, const at::Tensor&,
                                                                 std::int64_t);
extern template AttentionGeometry<c10::SymInt> check_packed_qkv(const char*, const at::Tensor&,
                                                                std::int64_t);

/// (batch, seq, embed) beside qkv (batch, seq, 3 * embed), in its dtype and on its device.
void check_packed_out(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& qkv, bool any_type);

/// Geometry of self-attention among `num_heads` heads, from checked sizes.
template <typename Int>
AttentionGeometry<Int> packed_geometry(c10::ArrayRef<Int> leading_sizes, std::int64_t num_heads,
                                       const Int& head_dim);

/// (batch, num_heads, seq, head_dim) of part `part`, 0 = query, of (batch, seq, parts * embed): the
/// same memory. Below autograd.
at::Tensor head_view(const at::Tensor& packed, std::int64_t part,
                     const AttentionGeometry<std::int64_t>& geometry);

/// packed_attention_forward and packed_attention_backward by way of attention_forward and
/// attention_backward and differentiable views: one concatenation more, for where a second
/// derivative or a transform is at work.
ForwardResult decomposed_packed_forward(const at::Tensor& qkv, std::int64_t num_heads,
                                        const OptionalTensor& attn_mask, double dropout_p,
                                        bool is_causal, const OptionalTensor& key_padding_mask,
                                        const OptionalTensor& dropout_seed);
PackedBackwardResult decomposed_packed_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask);

}  // namespace torch_ext
