// The arguments of one attention call, and the shape that they broadcast to.
//
// Alphabet of the shape comments: batch... (leading dimensions, at most 4), heads, q_len, kv_len,
// head_dim (query, key), value_dim (value, out). Tensors of 2 dimensions have neither batch nor
// heads, those of 3 no batch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../../kernels/strided_view.h"
#include "../optional_tensor.h"

namespace torch_ext {

/// The tensors of a call by position. The first kGradientCount have gradients.
enum AttentionTensor : std::size_t {
  kQuery,
  kKey,
  kValue,
  kMask,
  kSink,
  kPadding,
  kSeed,
  kAlibi,
};
constexpr std::size_t kGradientCount = kSink + 1;
constexpr std::size_t kTensorCount = kAlibi + 1;

using AttentionTensors = std::array<at::Tensor, kTensorCount>;  // undefined: not given
using GradientSet = std::array<bool, kGradientCount>;

/// Every argument of an attention call, whatever the operator. Refers to the caller's tensors; null
/// where one is not given. attention_signature.h fills it.
struct AttentionArguments {
  const at::Tensor* query = nullptr;      // (batch..., query_heads, q_len, head_dim)
  const at::Tensor* key = nullptr;        // (batch..., kv_heads, kv_len, head_dim)
  const at::Tensor* value = nullptr;      // (batch..., kv_heads, kv_len, value_dim)
  const at::Tensor* attn_mask = nullptr;  // broadcastable to (batch..., query_heads, q_len, kv_len)
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = std::nullopt;  // 1 / sqrt(head_dim) by default
  bool enable_gqa = false;
  c10::SymInt causal_offset = 0;                 // of the diagonal: diagonal_offset()
  const at::Tensor* key_padding_mask = nullptr;  // broadcastable to (batch..., kv_len)
  const at::Tensor* dropout_seed = nullptr;      // int64, one element; where dropout_p > 0
  bool contiguous =
      false;  // memory as torch leaves it without its flash kernel: attention_layout.h
  // Query i attends to keys i + offset - window_left <= j <= i + offset + window_right; -1 does not
  // bound; is_causal bounds the right side by 0.
  c10::SymInt window_left = -1;
  c10::SymInt window_right = -1;
  double softcap = 0.0;                      // s = softcap * tanh(s / softcap) where > 0
  const at::Tensor* alibi_slopes = nullptr;  // float, broadcastable to (batch..., query_heads)
  const at::Tensor* sink = nullptr;          // (query_heads), of any floating type
  bool causal_lower_right = false;           // the diagonal ends in the lower right corner

  /// Query i stands on the diagonal with key i + offset.
  template <typename Int>
  Int diagonal_offset(const Int& own_offset, const Int& q_len, const Int& kv_len) const {
    return causal_lower_right ? own_offset + kv_len - q_len : own_offset;
  }

  std::array<const at::Tensor*, kTensorCount> tensors() const {
    return {query, key, value, attn_mask, sink, key_padding_mask, dropout_seed, alibi_slopes};
  }

  std::array<const at::Tensor*, kGradientCount> differentiable() const {
    return {query, key, value, attn_mask, sink};
  }

  /// The same options over other tensors, kTensorCount of them, which have to outlive the result.
  AttentionArguments with_tensors(c10::ArrayRef<at::Tensor> tensors) const {
    AttentionArguments result = *this;
    const std::array<const at::Tensor**, kTensorCount> members{
        &result.query,        &result.key,         &result.value,
        &result.attn_mask,    &result.sink,        &result.key_padding_mask,
        &result.dropout_seed, &result.alibi_slopes};
    for (std::size_t position = 0; position < kTensorCount; ++position) {
      *members[position] = given(tensors[position]);
    }
    return result;
  }

  /// map(position, tensor) of every tensor that is given.
  template <typename Map>
  AttentionTensors map_tensors(const Map& map) const {
    AttentionTensors result;
    const auto own = tensors();
    for (std::size_t position = 0; position < kTensorCount; ++position) {
      if (own[position] == nullptr) continue;
      result[position] = map(static_cast<AttentionTensor>(position), *own[position]);
    }
    return result;
  }

  /// visit(name, member of a, member of b) for each option that is no tensor. A, B:
  /// AttentionArguments, const or not.
  template <typename A, typename B, typename Visit>
  static void visit_options(A& a, B& b, const Visit& visit) {
    visit("dropout_p", a.dropout_p, b.dropout_p);
    visit("is_causal", a.is_causal, b.is_causal);
    visit("scale", a.scale, b.scale);
    visit("enable_gqa", a.enable_gqa, b.enable_gqa);
    visit("causal_offset", a.causal_offset, b.causal_offset);
    visit("contiguous", a.contiguous, b.contiguous);
    visit("window_left", a.window_left, b.window_left);
    visit("window_right", a.window_right, b.window_right);
    visit("softcap", a.softcap, b.softcap);
    visit("causal_lower_right", a.causal_lower_right, b.causal_lower_right);
  }
};

/// What the backward pass takes besides.
struct AttentionGradients {
  const at::Tensor* grad_out = nullptr;        // as out, of any floating type
  const at::Tensor* grad_logsumexp = nullptr;  // as logsumexp, of any floating type, or null
  const at::Tensor* out = nullptr;             // (batch..., query_heads, q_len, value_dim)
  const at::Tensor* logsumexp = nullptr;       // (batch..., query_heads, q_len)
  GradientSet output_mask{};                   // which gradients are wanted
};

/// query, key and value in one tensor: (batch, seq, 3 * embed) or (seq, 3 * embed).
struct PackedProjection {
  const at::Tensor* qkv = nullptr;
  std::int64_t num_heads = 0;
};

/// The parameters of nn.MultiheadAttention, and its input.
struct SelfAttentionParameters {
  const at::Tensor* input = nullptr;
  const at::Tensor* in_proj_weight = nullptr;
  const at::Tensor* in_proj_bias = nullptr;  // null: none
  const at::Tensor* out_proj_weight = nullptr;
  const at::Tensor* out_proj_bias = nullptr;  // null: none
  std::int64_t num_heads = 0;
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, logsumexp
// of query, key, value, attn_mask, sink; undefined where not asked for
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// of qkv, attn_mask, sink
using PackedBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Sizes after broadcasting. Int is std::int64_t, or c10::SymInt while shapes are symbolic.
template <typename Int>
struct AttentionGeometry {
  std::int64_t rank = 0;                                   // of the output
  std::array<Int, kMaxBatchDims> batch_sizes{1, 1, 1, 1};  // aligned at the right
  Int query_heads = 1;
  Int kv_heads = 1;  // 1: all query heads share one
  Int q_len = 0;
  Int kv_len = 0;
  Int head_dim = 0;
  Int value_dim = 0;

  using Sizes = c10::SmallVector<Int, kMaxBatchDims + 3>;

  std::int64_t batch_dims() const { return rank > 3 ? rank - 3 : 0; }

  Sizes batch() const {
    Sizes result;
    for (std::int64_t dim = kMaxBatchDims - batch_dims(); dim < kMaxBatchDims; ++dim) {
      result.push_back(batch_sizes[dim]);
    }
    return result;
  }
  /// (batch..., [heads,]) followed by `tail`.
  Sizes sizes(const Int& heads, std::initializer_list<Int> tail) const {
    Sizes result = batch();
    if (rank >= 3) result.push_back(heads);
    for (const Int& size : tail) result.push_back(size);
    return result;
  }
  Sizes query_sizes() const { return sizes(query_heads, {q_len, head_dim}); }
  Sizes key_sizes() const { return sizes(kv_heads, {kv_len, head_dim}); }
  Sizes value_sizes() const { return sizes(kv_heads, {kv_len, value_dim}); }
  Sizes out_sizes() const { return sizes(query_heads, {q_len, value_dim}); }
  Sizes logsumexp_sizes() const { return sizes(query_heads, {q_len}); }
  Sizes score_sizes() const { return sizes(query_heads, {q_len, kv_len}); }
};

/// Type of logsumexp, and what the mask's gradient is summed in.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace torch_ext
