// What one attention call is: shapes, strides, mask, dropout. Filled by csrc/ops with designated
// initialisers, read by every kernel, on every device.
//
// Alphabet of the shape comments: batch (flattened), query_heads = kv_heads * group, q_len, kv_len,
// head_dim (query, key), value_dim (value, out).
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "attention_extent.h"
#include "strided_view.h"

namespace torch_ext {

struct AttentionShape {
  std::array<std::int64_t, kMaxBatchDims> batch_sizes{1, 1, 1, 1};
  std::int64_t query_heads = 1;  // a multiple of kv_heads: head h reads kv head h / group
  std::int64_t kv_heads = 1;
  std::int64_t q_len = 0;
  std::int64_t kv_len = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;

  constexpr std::int64_t batch() const {
    return batch_sizes[0] * batch_sizes[1] * batch_sizes[2] * batch_sizes[3];
  }
  constexpr std::int64_t group() const { return kv_heads == 0 ? 1 : query_heads / kv_heads; }
};

enum class AttentionMaskKind : std::uint8_t { kNone, kBoolean, kAdditive };

/// (batch, query_heads, q_len, kv_len). kBoolean: bytes, non-zero = attend. kAdditive: added to the
/// scores.
struct AttentionMask {
  AttentionMaskKind kind = AttentionMaskKind::kNone;
  ScalarType dtype = ScalarType::kFloat32;  // of an additive one
  ConstStridedView view{};
};

/// -slope * |i + offset - j| is added to the score of query i and key j, with the window's offset.
struct AlibiSlopes {
  const float* data = nullptr;  // (batch, query_heads); null: none
  std::array<std::int64_t, kMaxBatchDims> batch_strides{};
  std::int64_t head_stride = 0;
};

/// From query . key to the score that softmax takes, in this order: the scale; the soft cap; what
/// the additive mask and ALiBi add; -inf for pairs that mask, padding or window exclude.
struct ScoreTransform {
  double scale = 1.0;
  double softcap = 0.0;  // > 0: s = softcap * tanh(s / softcap)
  AttentionMask mask{};
  /// (batch, kv_len) bytes, non-zero = ignore that key, as nn.MultiheadAttention's. Only
  /// batch_strides and col_stride are used; data == nullptr: none.
  ConstStridedView key_padding{};
  KeyWindow window{};
  AlibiSlopes alibi{};
  /// (query_heads) contiguous, of logsumexp's type: one more logit of each row, without a value.
  const void* sink = nullptr;
};

/// Keys and values in pages of a cache: row j of both is row (first_row + j) % page_size of page
/// table[(first_row + j) / page_size]. The views' row strides are those within a page.
struct PagedRows {
  const std::int32_t* table = nullptr;  // null: no pages
  std::int64_t first_row = 0;
  std::int64_t page_size = 0;
  std::int64_t key_page_stride = 0;  // in elements
  std::int64_t value_page_stride = 0;
};

struct AttentionDropout {
  double probability = 0.0;
  /// One 64-bit seed in the kernel's own memory; read only when probability > 0.
  const std::int64_t* seed = nullptr;
  std::uint64_t seed_offset = 0;  // added to the seed
};

/// out = softmax(transform(query key^T)) value. A row that attends to nothing gives out = 0 and
/// logsumexp = -inf, or its sink.
struct AttentionForwardParams {
  ScalarType dtype = ScalarType::kFloat32;  // of query, key, value, out
  AttentionShape shape{};
  ConstStridedView query{};  // (batch, query_heads, q_len, head_dim)
  ConstStridedView key{};    // (batch, kv_heads, kv_len, head_dim)
  ConstStridedView value{};  // (batch, kv_heads, kv_len, value_dim)
  StridedView out{};         // (batch, query_heads, q_len, value_dim)
  /// (batch, query_heads, q_len) contiguous; natural logarithm; float, or double for kFloat64.
  /// May be null.
  void* logsumexp = nullptr;
  /// Elements from one head's rows of logsumexp to the next one's. 0: q_len.
  std::int64_t logsumexp_head_stride = 0;
  ScoreTransform transform{};
  AttentionDropout dropout{};
  PagedRows pages{};
  /// Of key and value where they are no `dtype`: kInt8 or kFloat8E4M3. Their factors are in
  /// transform.scale and here.
  std::optional<ScalarType> stored_type = std::nullopt;
  double value_scale = 1.0;
};

/// The element type of key and value.
constexpr TORCH_EXT_ALWAYS_INLINE ScalarType key_type(const AttentionForwardParams& params) {
  return params.stored_type.has_value() ? *params.stored_type : params.dtype;
}

/// Gradients of AttentionForwardParams' out and logsumexp. With P the normalised weights, keep the
/// dropout factor and delta = rowsum(grad_out * out) - grad_logsumexp:
///   dP = grad_out value^T * keep,  dS = P * (dP - delta),
///   grad_query = scale dS key,  grad_key = scale dS^T query,  grad_value = (P * keep)^T grad_out.
struct AttentionBackwardParams {
  ScalarType dtype = ScalarType::kFloat32;  // of all tensors but the mask and logsumexp
  AttentionShape shape{};
  ConstStridedView query{};
  ConstStridedView key{};
  ConstStridedView value{};
  ConstStridedView out{};
  ConstStridedView grad_out{};             // any strides, 0 too
  const void* logsumexp = nullptr;         // as written by the forward pass
  const void* grad_logsumexp = nullptr;    // the same layout and type, or null
  std::int64_t logsumexp_head_stride = 0;  // as the forward pass's
  /// Whether somebody has seen that no logsumexp is so large that its rounding matters; else the
  /// kernels look themselves.
  bool logsumexp_is_small = false;
  /// grad_query, grad_key and grad_value are float instead of bfloat16 or float16: the caller has
  /// yet to sum them over what was broadcast.
  bool unrounded_grads = false;
  // Written whole, never read; data == nullptr: not wanted.
  StridedView grad_query{};
  StridedView grad_key{};
  StridedView grad_value{};
  /// Gradient of an additive mask: float (double for kFloat64), in the mask's own shape, a stride
  /// of 0 standing for each dimension that the mask broadcasts (size 1 there). data == nullptr: not
  /// wanted. Its strides are 0 exactly where the mask's are broadcast.
  StridedView grad_mask{};
  /// (batch, query_heads) contiguous, logsumexp's type: summed over the queries. nullptr: not
  /// wanted.
  void* grad_sink = nullptr;
  ScoreTransform transform{};
  AttentionDropout dropout{};
};

/// Where logsumexp has the row of a query; `slice` counts (batch, query_heads).
template <typename Params>
constexpr TORCH_EXT_ALWAYS_INLINE std::int64_t logsumexp_row(const Params& params,
                                                             std::int64_t slice,
                                                             std::int64_t query) {
  const std::int64_t stride =
      params.logsumexp_head_stride == 0 ? params.shape.q_len : params.logsumexp_head_stride;
  return slice * stride + query;
}

/// The element type of grad_query, grad_key and grad_value.
constexpr TORCH_EXT_ALWAYS_INLINE ScalarType gradient_type(const AttentionBackwardParams& params) {
  return params.unrounded_grads && params.dtype != ScalarType::kFloat64 ? ScalarType::kFloat32
                                                                        : params.dtype;
}

}  // namespace torch_ext
