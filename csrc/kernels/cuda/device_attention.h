// AttentionForwardParams and AttentionBackwardParams as kernels take them: plain arrays, and what
// is the same for all blocks worked out once.
#pragma once

#include <cstdint>

#include "../attention_params.h"
#include "../counter_rng.h"
#include "device_program.h"

namespace torch_ext::cuda {

struct DeviceShape {
  std::int64_t batch_sizes[kMaxBatchDims];
  std::int64_t batch;
  std::int64_t query_heads;
  std::int64_t kv_heads;
  std::int64_t group;
  std::int64_t q_len;
  std::int64_t kv_len;
  std::int64_t head_dim;
  std::int64_t value_dim;
};

template <typename Pointer>
struct BasicDeviceView {
  Pointer data;
  std::int64_t batch_strides[kMaxBatchDims];
  std::int64_t head_stride;
  std::int64_t row_stride;
  std::int64_t col_stride;
  /// Rows start at multiples of 16 bytes and consist of whole 16 bytes, one behind the other.
  bool copies_whole_chunks;
};
using DeviceView = BasicDeviceView<const void*>;
using DeviceOutput = BasicDeviceView<void*>;

/// Element offset of (batch, head).
template <typename View>
TORCH_EXT_DEVICE std::int64_t slice_start(const View& view, const DeviceShape& shape,
                                          std::int64_t batch, std::int64_t head) {
  std::int64_t offset = head * view.head_stride;
  TORCH_EXT_UNROLL
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    const std::int64_t size = shape.batch_sizes[dim];
    if (size == 1) continue;
    offset += batch % size * view.batch_strides[dim];
    batch /= size;
  }
  return offset;
}

/// Which tiles of 64 queries x 64 keys boolean masks and key padding empty or fill: bits of each,
/// over (batch..., head, row tile, column tile), strides of 0 where they broadcast.
inline constexpr int kMapTile = 64;
inline constexpr std::uint8_t kSomeAttend = 1;
inline constexpr std::uint8_t kSomeMasked = 2;

struct TileMap {
  std::uint8_t* bits;  // null: nothing is masked but by causality and additive masks
  std::int64_t batch_strides[kMaxBatchDims];
  std::int64_t head_stride;
  std::int64_t row_stride;  // 0: one row of tiles for all queries
  std::int64_t row_tiles;
  std::int64_t column_tiles;
  std::int64_t batch_sizes[kMaxBatchDims];  // of the map itself
  std::int64_t heads;
  std::int64_t entries;
};

struct DeviceMasking {
  AttentionMaskKind kind;
  ScalarType mask_dtype;
  DeviceView mask;
  DeviceView padding;  // data == null: none
  bool is_causal;
  std::int64_t causal_offset;  // within [-q_len, kv_len]
  TileMap map;

  /// One past the last key that query `row` may attend to.
  TORCH_EXT_HOST_DEVICE std::int64_t key_end(std::int64_t row, std::int64_t kv_len) const {
    if (!is_causal) return kv_len;
    const std::int64_t end = row + causal_offset + 1;
    return end < 0 ? 0 : end < kv_len ? end : kv_len;
  }
};

struct DeviceDropout {
  bool active;
  std::uint32_t threshold;
  double scale;  // of kept weights; 1 without dropout
  const std::int64_t* seed;
};

struct AttentionForwardArgs {
  DeviceShape shape;
  DeviceView query, key, value;
  DeviceOutput out;
  void* logsumexp;  // may be null
  double scale;
  DeviceMasking masking;
  DeviceDropout dropout;
  /// Heads that share one kv head and lie in one row tile, interleaved: 1 or shape.group.
  std::int64_t pack;
  std::int64_t row_tiles;
  std::int64_t splits;     // of the keys
  std::int64_t split_len;  // a multiple of kMapTile
  void* partial_out;       // (splits, slices, rows, value_dim), not normalised; null: no splits
  void* partial_stats;     // (splits, slices, rows, 2): reference, sum
  /// Natural scores are unit * those that the kernel keeps: scale where it keeps products, else 1.
  double unit;

  TORCH_EXT_HOST_DEVICE std::int64_t rows() const { return shape.q_len * pack; }
  TORCH_EXT_HOST_DEVICE std::int64_t slices() const {
    return shape.batch * (shape.query_heads / pack);
  }
};

inline constexpr int kRowStats = 3;

struct AttentionBackwardArgs {
  DeviceShape shape;
  DeviceView query, key, value, out, grad_out;
  const void* logsumexp;
  const void* grad_logsumexp;                     // may be null
  DeviceOutput grad_query, grad_key, grad_value;  // data == null: not wanted
  bool unrounded_grads;                           // those three are float, not 16-bit
  DeviceOutput grad_mask;
  double scale;
  DeviceMasking masking;
  DeviceDropout dropout;
  /// (slices, kRowStats, padded_rows): logsumexp, +inf where a row attends to nothing or does not
  /// exist; delta; what the exponents of the row's weights lack where logsumexp is too large for
  /// its type, 0 elsewhere.
  void* row_stats;
  std::int64_t padded_rows;  // q_len in whole tiles
  /// Sum of dQ over the key tiles, in the order of the accumulators; null: by a pass of its own.
  float* grad_query_sum;
  std::int64_t tiles;       // of a slice: keys, queries, or the mask's own
  std::int64_t dim_chunks;  // of head_dim and value_dim, where not one block takes all
  // The mask's gradient.
  std::int64_t mask_batch_sizes[kMaxBatchDims];  // of the mask itself
  std::int64_t mask_heads, mask_rows, mask_cols;
  std::int64_t mask_row_tiles, mask_column_tiles;
  std::int64_t shares;    // (batch, head, row tile, column tile) that add to one tile of the mask
  std::int64_t partials;  // ordered partial sums of them
  void* mask_partial;     // (partials, the mask's own shape)
};

}  // namespace torch_ext::cuda
