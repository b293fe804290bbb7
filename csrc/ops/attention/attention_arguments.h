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
enum AttentionTensor : std::size_t { kQuery, kKey, kValue, kMask, kPadding, kSeed };
constexpr std::size_t kGradientCount = kMask + 1;
constexpr std::size_t kTensorCount = kSeed + 1;

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
  c10::SymInt causal_offset = 0;                 // with is_causal: keys j <= i + causal_offset
  const at::Tensor* key_padding_mask = nullptr;  // broadcastable to (batch..., kv_len)
  const at::Tensor* dropout_seed = nullptr;      // int64, one element; where dropout_p > 0
  bool contiguous =
      false;  // memory as torch leaves it without its flash kernel: attention_layout.h

  std::array<const at::Tensor*, kTensorCount> tensors() const {
    return {query, key, value, attn_mask, key_padding_mask, dropout_seed};
  }

  std::array<const at::Tensor*, kGradientCount> differentiable() const {
    return {query, key, value, attn_mask};
  }

  /// The same options over other tensors, kTensorCount of them, which have to outlive the result.
  AttentionArguments with_tensors(c10::ArrayRef<at::Tensor> tensors) const {
    AttentionArguments result = *this;
    const std::array<const at::Tensor**, kTensorCount> members{&result.query,
                                                               &result.key,
                                                               &result.value,
                                                               &result.attn_mask,
                                                               &result.key_padding_mask,
                                                               &result.dropout_seed};
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

  /// visit(name, member) for each option that is no tensor. Arguments: AttentionArguments, const or
  /// not.
  template <typename Arguments, typename Visit>
  static void visit_options(Arguments& arguments, const Visit& visit) {
    visit("dropout_p", arguments.dropout_p);
    visit("is_causal", arguments.is_causal);
    visit("scale", arguments.scale);
    visit("enable_gqa", arguments.enable_gqa);
    visit("causal_offset", arguments.causal_offset);
    visit("contiguous", arguments.contiguous);
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
// of query, key, value, attn_mask; undefined where not asked for
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using PackedBackwardResult = std::tuple<at::Tensor, at::Tensor>;  // of qkv, attn_mask

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

  /// (batch..., [heads,]) followed by `tail`.
  Sizes sizes(const Int& heads, std::initializer_list<Int> tail) const {
    Sizes result;
    for (std::int64_t dim = kMaxBatchDims - batch_dims(); dim < kMaxBatchDims; ++dim) {
      result.push_back(batch_sizes[dim]);
    }
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
