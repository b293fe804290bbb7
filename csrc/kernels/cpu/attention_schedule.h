// How one attention call is cut into tasks and where its scratch memory lies. Every rule depends on
// shapes only, never on the number of workers, so results are bitwise the same for every thread
// count; the workers only add their private areas at the end of the workspace.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "../attention_params.h"

namespace torch_ext {

/// What an instruction set's tiles look like.
struct TileGeometry {
  int lanes;         // compute elements per vector
  int max_vectors;   // vectors per sub-tile
  int compute_size;  // bytes of a compute element: 4 or 8
  int depth;         // elements that one contraction step consumes: 2 for bf16 pairs
};

/// (slice, row tile, column tile) classes of a boolean mask, one slice for all heads and batches
/// that share it.
struct MaskMapPlan {
  bool used = false;
  std::array<bool, kMaxBatchDims> batch_varies{};
  bool head_varies = false;
  std::int64_t slices = 0;
  std::int64_t row_tiles = 0;  // 1 when the mask broadcasts over queries
  std::int64_t row_tile = 0;   // queries (forward: of the flattened rows, / group)
  std::int64_t column_tiles = 0;
  std::int64_t column_tile = 0;
  std::size_t offset = 0;  // bytes into the workspace
};

/// Index of (batch, kv_head)'s slice.
std::int64_t mask_map_slice(const MaskMapPlan& plan, const AttentionShape& shape,
                            std::int64_t batch, std::int64_t kv_head);

inline constexpr std::int64_t kDecodeRows = 4;

/// A tile's keys begin at a multiple: of the vectors of every instruction set, and of the keys
/// whose dropout is drawn together.
inline constexpr std::int64_t kKeyUnit = 16;

/// Forward: rows = q_len * group, query-major, so that the grouped heads of one position are
/// neighbours and share the staged K and V.
struct ForwardPlan {
  bool decode = false;          // at most kDecodeRows rows: lanes = head_dim
  std::int64_t pairs = 0;       // batch * kv_heads
  std::int64_t rows = 0;        // q_len * group
  std::int64_t sub_tile = 0;    // rows per sub-tile
  std::int64_t super_tile = 0;  // rows per task
  std::int64_t row_tiles = 0;
  std::int64_t kv_block = 0;
  std::int64_t kv_splits = 1;  // of the keys that a row tile sees
  std::int64_t kv_split_len = 0;
  MaskMapPlan mask_map;
  /// Units of work, each of one pair, row tile and split; and rows that are joined afterwards.
  std::int64_t units() const { return pairs * row_tiles * kv_splits; }
  std::int64_t join_units() const { return kv_splits > 1 ? pairs * rows : 0; }

  std::size_t partial_offset =
      0;  // (pair, split, row, value_dim + 3): out, maximum, reference, sum
  std::size_t worker_offset = 0;
  std::size_t worker_bytes = 0;
  std::size_t total_bytes = 0;

  /// The keys of a row tile that the window leaves, from the start of a block on.
  Range keys_of_row_tile(const AttentionForwardParams& params, std::int64_t row_tile) const;
  /// The part of them that falls to a split.
  Range keys_of_task(const AttentionForwardParams& params, std::int64_t row_tile,
                     std::int64_t split) const;
};

/// Most sub-tiles that share a staged block of K and V.
inline constexpr std::int64_t kMaxSubTiles = 16;

ForwardPlan plan_forward(const AttentionForwardParams& params, const TileGeometry& geometry,
                         int num_workers);

/// Backward: a task is a group of (batch, kv_head) pairs and a chunk of keys. Pairs are grouped
/// only where they share a slice of the mask's gradient.
struct BackwardPlan {
  std::int64_t pairs = 0;
  std::int64_t query_block = 0;
  std::int64_t key_tile = 0;
  std::int64_t chunks = 1;
  std::int64_t chunk_len = 0;
  std::int64_t head_stride = 0;  // staged columns of head_dim
  bool few_rows = false;         // the decoding kernel made the forward pass

  bool mask_gradient = false;
  std::array<bool, kMaxBatchDims> mask_batch_varies{};
  bool mask_head_varies = false;
  std::int64_t mask_slices = 1;
  std::int64_t mask_shares = 1;    // pairs per slice
  std::int64_t mask_partials = 1;  // ordered partial sums per slice over the pairs
  std::int64_t mask_rows = 0;      // elements of a partial: heads of a slice * rows * columns
  std::int64_t mask_cols = 0;
  std::int64_t mask_heads = 0;
  /// Its terms and those of the other gradients are two numbers.
  bool caps_masked_scores = false;

  MaskMapPlan mask_map;
  std::size_t query_partial_offset = 0;  // (chunk, batch * query_heads, q_len, head_stride)
  std::size_t mask_partial_offset = 0;
  std::size_t statistics_offset = 0;  // (2, batch * query_heads * q_len): reference, factor
  std::size_t worker_offset = 0;
  std::size_t worker_bytes = 0;
  std::size_t total_bytes = 0;

  std::int64_t rows_per_pair(const AttentionShape& shape) const {
    return shape.q_len * shape.group();
  }
  /// Units of work, each of a group and a chunk; and rows of dQ that are joined afterwards.
  std::int64_t units() const { return groups() * chunks; }
  std::int64_t join_units(const AttentionBackwardParams& params) const {
    return chunks > 1 && params.grad_query.data != nullptr ? pairs * rows_per_pair(params.shape)
                                                           : 0;
  }
  std::int64_t groups() const { return mask_gradient ? mask_slices * mask_partials : pairs; }
  std::int64_t mask_column_chunks() const { return mask_gradient && mask_cols == 1 ? chunks : 1; }
};

BackwardPlan plan_backward(const AttentionBackwardParams& params, const TileGeometry& geometry,
                           int num_workers);

/// The `index`-th (batch * kv_heads + kv_head) pair that reads slice `slice` of the mask gradient.
std::int64_t mask_sharing_pair(const BackwardPlan& plan, const AttentionShape& shape,
                               std::int64_t slice, std::int64_t index);

}  // namespace torch_ext
