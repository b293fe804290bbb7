// The arguments of one attention call on packed sequences, and the sizes that they have in common.
//
// Alphabet of the shape comments: total_q, total_k (rows of all sequences), heads, kv_heads,
// head_dim (query, key), value_dim (value, out), sequences.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "../optional_tensor.h"

namespace torch_ext {

struct VarlenArguments {
  at::Tensor query;  // (total_q, heads, head_dim)
  at::Tensor key;    // (total_k, kv_heads, head_dim), or (pages, page_size, kv_heads, head_dim)
  at::Tensor value;  // (total_k, kv_heads, value_dim), or (pages, page_size, kv_heads, value_dim)
  at::Tensor cu_seq_q;  // int32 or int64, (sequences + 1): where each sequence's queries begin
  OptionalTensor cu_seq_k = std::nullopt;  // likewise for its keys; None with pages and seqused_k
  c10::SymInt max_q = 0;
  c10::SymInt max_k = 0;
  double dropout_p = 0.0;
  std::optional<double> scale = std::nullopt;  // 1 / sqrt(head_dim) by default
  /// Query i of q_len attends to the keys [i + kv_len - q_len - left, ... + right]; -1: unbounded.
  std::array<std::int64_t, 2> window_size{-1, -1};
  bool enable_gqa = false;
  OptionalTensor seqused_k = std::nullopt;  // int32 or int64, (sequences): of the keys, the first
  double softcap = 0.0;
  OptionalTensor alibi_slopes = std::nullopt;  // float32, (heads) or (sequences, heads)
  OptionalTensor sink = std::nullopt;          // (heads)
  OptionalTensor dropout_seed = std::nullopt;  // int64, one element; where dropout_p > 0

  // Of keys and values in pages, which are for inference.
  OptionalTensor block_table = std::nullopt;  // int32, (sequences, pages): the pages in their order
  OptionalTensor leftpad_k = std::nullopt;    // int32 or int64, (sequences): rows skipped in front
  OptionalTensor k_scale = std::nullopt;      // float32, () or (kv_heads): key = stored * k_scale
  OptionalTensor v_scale = std::nullopt;
};

struct VarlenGradients {
  at::Tensor grad_out;            // (total_q, heads, value_dim)
  OptionalTensor grad_logsumexp;  // (heads, total_q)
  at::Tensor out;
  at::Tensor logsumexp;
  std::array<bool, 4> output_mask{true, true, true, false};  // of query, key, value, sink
};

using VarlenForwardResult = std::tuple<at::Tensor, at::Tensor>;  // out, logsumexp
// of query, key, value, sink; undefined where not asked for
using VarlenBackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct VarlenSizes {
  c10::SymInt total_q, total_k, heads, kv_heads, head_dim, value_dim, sequences;
};

}  // namespace torch_ext
