// The arguments of one attention call, and the shape that they broadcast to.
//
// Alphabet of the shape comments: batch... (leading dimensions, at most 4), heads, q_len, kv_len,
// head_dim (query, key), value_dim (value, out). Tensors of 2 dimensions have neither batch nor
// heads, those of 3 no batch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>
#include <optional>

#include "../../kernels/strided_view.h"
#include "../optional_tensor.h"

namespace torch_ext {

/// Refers to the caller's tensors.
struct AttentionArguments {
  const at::Tensor& query;                // (batch..., query_heads, q_len, head_dim)
  const at::Tensor& key;                  // (batch..., kv_heads, kv_len, head_dim)
  const at::Tensor& value;                // (batch..., kv_heads, kv_len, value_dim)
  const at::Tensor* attn_mask = nullptr;  // broadcastable to (batch..., query_heads, q_len, kv_len)
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = std::nullopt;  // 1 / sqrt(head_dim) by default
  bool enable_gqa = false;
  const at::Tensor* key_padding_mask = nullptr;  // broadcastable to (batch..., kv_len)
  const at::Tensor* dropout_seed = nullptr;      // int64, one element; where dropout_p > 0
  bool contiguous =
      false;  // memory as torch leaves it without its flash kernel: attention_layout.h
};

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
