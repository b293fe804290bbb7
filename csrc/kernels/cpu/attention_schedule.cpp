#include "attention_schedule.h"

#include <algorithm>

namespace torch_ext {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Of the query panels and accumulators of a task, in a second-level cache of 512 KiB and more.
constexpr std::int64_t kPanelBytes = 256 * 1024;

std::size_t align(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::size_t staged_bytes(std::int64_t rows, std::int64_t columns, const TileGeometry& geometry) {
  return align(static_cast<std::size_t>((rows + 1) / 2 * 2 *
                                        (ceil_div(columns, geometry.lanes) * geometry.lanes) *
                                        geometry.compute_size));
}

// Classes are per slice of the mask that differs; dimensions it broadcasts over share one.
MaskMapPlan plan_mask_map(const AttentionMask& mask, const AttentionShape& shape,
                          std::int64_t row_tiles, std::int64_t row_tile, std::int64_t column_tile) {
  MaskMapPlan plan;
  if (mask.kind != AttentionMaskKind::kBoolean) return plan;
  // No pairs: the mask has no address, and nobody asks.
  if (shape.batch() * shape.query_heads * shape.q_len * shape.kv_len == 0) return plan;
  plan.used = true;
  plan.slices = 1;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    plan.batch_varies[dim] = mask.view.batch_strides[dim] != 0 && shape.batch_sizes[dim] > 1;
    if (plan.batch_varies[dim]) plan.slices *= shape.batch_sizes[dim];
  }
  plan.head_varies = mask.view.head_stride != 0 && shape.query_heads > 1;
  if (plan.head_varies) plan.slices *= shape.kv_heads;
  plan.row_tiles = mask.view.row_stride == 0 ? 1 : row_tiles;
  plan.row_tile = row_tile;
  plan.column_tile = column_tile;
  plan.column_tiles = ceil_div(shape.kv_len, column_tile);
  return plan;
}

std::size_t mask_map_bytes(const MaskMapPlan& plan) {
  return plan.used
             ? align(static_cast<std::size_t>(plan.slices * plan.row_tiles * plan.column_tiles))
             : 0;
}

// Whether rows are few enough to read keys and values where they lie: the decoding kernel, and the
// backward pass, whose scores are to be the same.
bool takes_few_rows(ScalarType dtype, std::int64_t rows, const ConstStridedView& key,
                    const ConstStridedView& value) {
  return rows > 0 && rows <= kDecodeRows && dtype != ScalarType::kFloat64 && key.col_stride == 1 &&
         value.col_stride == 1;
}

// Windows of which a block of 64 queries leaves too much unused: at 64 to 256 keys blocks of 32
// take 7 to 13% off the backward pass, at 512 nothing.
bool is_narrow(const KeyWindow& window) {
  constexpr std::int64_t kMost = 256;
  return window.left < kMost && window.right < kMost && window.left + window.right < kMost;
}

}  // namespace

Range ForwardPlan::keys_of_row_tile(const AttentionForwardParams& params,
                                    std::int64_t row_tile) const {
  const std::int64_t group = params.shape.group();
  const std::int64_t first_row = row_tile * super_tile;
  const std::int64_t end_row = std::min(first_row + super_tile, rows);
  const Range queries{first_row / group, (end_row - 1) / group + 1};
  Range keys = keys_of_any(params.transform.window, queries, params.shape.kv_len);
  keys.begin = keys.begin / kv_block * kv_block;
  return keys;
}

Range ForwardPlan::keys_of_task(const AttentionForwardParams& params, std::int64_t row_tile,
                                std::int64_t split) const {
  const Range keys = keys_of_row_tile(params, row_tile);
  const std::int64_t begin = keys.begin + split * kv_split_len;
  return {begin, std::min(begin + kv_split_len, keys.end)};
}

ForwardPlan plan_forward(const AttentionForwardParams& params, const TileGeometry& geometry,
                         int num_workers) {
  const AttentionShape& shape = params.shape;
  ForwardPlan plan;
  plan.pairs = shape.batch() * shape.kv_heads;
  plan.rows = shape.q_len * shape.group();
  plan.sub_tile = static_cast<std::int64_t>(geometry.lanes) * geometry.max_vectors;
  plan.decode = takes_few_rows(params.dtype, plan.rows, params.key, params.value);
  // The more sub-tiles share a block of K and V, the less often it comes from the third-level cache
  // and is converted: 4 to 16 measured 67 to 73% of peak in fp32. Their panels have to stay in the
  // second-level cache, and tasks must be many enough for many cores.
  const std::int64_t sub_tiles = std::max<std::int64_t>(ceil_div(plan.rows, plan.sub_tile), 1);
  const std::int64_t sub_tile_bytes =
      (shape.head_dim + shape.value_dim) * plan.sub_tile * geometry.compute_size;
  const std::int64_t most = std::clamp<std::int64_t>(
      kPanelBytes / std::max<std::int64_t>(sub_tile_bytes, 1), 4, kMaxSubTiles);
  const std::int64_t wanted_row_tiles = ceil_div(32, std::max<std::int64_t>(plan.pairs, 1));
  plan.row_tiles = plan.decode ? 1
                               : std::clamp(wanted_row_tiles, ceil_div(sub_tiles, most),
                                            ceil_div(sub_tiles, std::int64_t{4}));
  const std::int64_t sub_tiles_per_task = ceil_div(sub_tiles, plan.row_tiles);
  plan.super_tile = std::min(sub_tiles_per_task, kMaxSubTiles) * plan.sub_tile;
  if (!plan.decode) plan.row_tiles = ceil_div(plan.rows, plan.super_tile);
  plan.kv_block = 64;

  // Split the keys where pairs and row tiles alone make too few tasks. Decoding reads memory and
  // computes little, so its pieces may be many.
  std::int64_t kv_span = plan.rows == 0 ? shape.kv_len : 0;  // without rows nobody asks
  for (std::int64_t tile = 0; tile < plan.row_tiles; ++tile) {
    kv_span = std::max(kv_span, plan.keys_of_row_tile(params, tile).size());
  }
  const std::int64_t tasks = std::max<std::int64_t>(plan.pairs * plan.row_tiles, 1);
  const std::int64_t wanted = plan.decode ? 64 : 16;
  plan.kv_splits = std::clamp(ceil_div(wanted, tasks), std::int64_t{1},
                              std::max<std::int64_t>(kv_span / 512, 1));
  plan.kv_split_len = ceil_div(ceil_div(kv_span, plan.kv_splits), plan.kv_block) * plan.kv_block;
  if (plan.kv_split_len > 0) plan.kv_splits = ceil_div(kv_span, plan.kv_split_len);
  plan.kv_splits = std::max<std::int64_t>(plan.kv_splits, 1);

  plan.mask_map = plan_mask_map(
      params.transform.mask, shape, plan.decode ? 1 : ceil_div(plan.rows, plan.sub_tile),
      plan.decode ? std::max<std::int64_t>(plan.rows, 1) : plan.sub_tile, plan.kv_block);

  const std::size_t compute = geometry.compute_size;
  std::size_t worker = 0;
  if (plan.decode) {
    const auto padded = [&](std::int64_t n) {
      return ceil_div(n, geometry.lanes) * geometry.lanes;
    };
    worker += align(kDecodeRows * padded(shape.head_dim) * compute);
    worker += 2 * align(kDecodeRows * padded(shape.value_dim) * compute);
    worker += align((kDecodeRows * plan.kv_block + geometry.lanes) * compute);
    worker += align(plan.kv_block * compute);
  } else {
    const std::size_t lanes = static_cast<std::size_t>(plan.sub_tile);
    std::size_t tile =
        align((shape.head_dim + 1) / geometry.depth * lanes * (geometry.depth == 2 ? 4 : compute));
    tile += align(shape.value_dim * lanes * compute);
    tile += 7 * align(lanes * compute) + 2 * align(lanes * 4) + 3 * align(lanes * 8);
    worker += tile * (plan.super_tile / plan.sub_tile);
    worker += staged_bytes(plan.kv_block, shape.head_dim, geometry);
    worker += staged_bytes(plan.kv_block, shape.value_dim, geometry);
    worker += align(plan.kv_block * lanes * compute);
  }

  plan.mask_map.offset = 0;
  plan.partial_offset = mask_map_bytes(plan.mask_map);
  plan.worker_offset = plan.partial_offset;
  if (plan.kv_splits > 1) {
    plan.worker_offset +=
        align(plan.pairs * plan.kv_splits * plan.rows * (shape.value_dim + 3) * compute);
  }
  plan.worker_bytes = align(worker);
  plan.total_bytes = plan.worker_offset + plan.worker_bytes * num_workers;
  return plan;
}

BackwardPlan plan_backward(const AttentionBackwardParams& params, const TileGeometry& geometry,
                           int num_workers) {
  const AttentionShape& shape = params.shape;
  const std::int64_t sub_tile = static_cast<std::int64_t>(geometry.lanes) * geometry.max_vectors;
  const std::int64_t head = std::max(shape.head_dim, shape.value_dim);
  BackwardPlan plan;
  plan.pairs = shape.batch() * shape.kv_heads;
  // Five panels of key_tile x head_dim live in the second-level cache: wide tiles for small heads,
  // so that converting Q and dO and adding into dQ amortise.
  const std::int64_t sub_tiles = head * sub_tile * geometry.compute_size <= 64 * 24 * 4    ? 4
                                 : head * sub_tile * geometry.compute_size <= 160 * 24 * 4 ? 2
                                                                                           : 1;
  const std::int64_t unit = 2 * (64 / 4);  // keys whose dropout bits are made together
  plan.key_tile = ceil_div(sub_tile * sub_tiles, unit) * unit;
  // Equal tiles rather than a small one at the end.
  const std::int64_t tiles = std::max<std::int64_t>(ceil_div(shape.kv_len, plan.key_tile), 1);
  plan.key_tile = std::max<std::int64_t>(ceil_div(ceil_div(shape.kv_len, tiles), unit), 1) * unit;
  plan.query_block = head <= 128 && !is_narrow(params.transform.window) ? 64 : 32;
  plan.head_stride = ceil_div(shape.head_dim, geometry.lanes) * geometry.lanes;
  plan.few_rows = takes_few_rows(params.dtype, plan.rows_per_pair(shape), params.key, params.value);

  // A chunk costs a partial dQ, 16 bytes of traffic for 10 * chunk_len operations: 1024 keys keep
  // that near 3%, 256 are accepted where there would be hardly any tasks.
  const std::int64_t pairs = std::max<std::int64_t>(plan.pairs, 1);
  plan.chunks = std::max({std::int64_t{1}, std::min(ceil_div(64, pairs), shape.kv_len / 1024),
                          std::min(ceil_div(16, pairs), shape.kv_len / 256)});
  plan.chunk_len = std::max<std::int64_t>(
      ceil_div(ceil_div(shape.kv_len, plan.chunks), plan.key_tile) * plan.key_tile, plan.key_tile);
  plan.chunks = std::max<std::int64_t>(ceil_div(shape.kv_len, plan.chunk_len), 1);

  const StridedView& mask = params.grad_mask;
  plan.mask_gradient = mask.data != nullptr;
  plan.caps_masked_scores = plan.mask_gradient && params.transform.softcap > 0.0;
  if (plan.mask_gradient) {
    for (int dim = 0; dim < kMaxBatchDims; ++dim) {
      plan.mask_batch_varies[dim] = mask.batch_strides[dim] != 0;
      (plan.mask_batch_varies[dim] ? plan.mask_slices : plan.mask_shares) *= shape.batch_sizes[dim];
    }
    plan.mask_head_varies = mask.head_stride != 0;
    (plan.mask_head_varies ? plan.mask_slices : plan.mask_shares) *= shape.kv_heads;
    plan.mask_heads = plan.mask_head_varies ? shape.group() : 1;
    plan.mask_cols = mask.col_stride != 0 ? shape.kv_len : 1;
    plan.mask_rows = mask.row_stride != 0 ? shape.q_len : 1;
    plan.mask_partials =
        std::clamp(ceil_div(16, std::max<std::int64_t>(plan.mask_slices * plan.chunks, 1)),
                   std::int64_t{1}, std::max<std::int64_t>(plan.mask_shares, 1));
  }

  plan.mask_map =
      plan_mask_map(params.transform.mask, shape, ceil_div(shape.q_len, plan.query_block),
                    plan.query_block, plan.key_tile);

  const std::size_t compute = geometry.compute_size;
  const std::size_t scalar = geometry.depth == 2 ? 4 : compute;
  const std::size_t keys = static_cast<std::size_t>(plan.key_tile);
  const std::size_t queries = static_cast<std::size_t>(plan.query_block + 1);
  std::size_t worker = 0;
  worker += align((shape.head_dim + 1) * keys * scalar);                   // K^T
  worker += align((shape.value_dim + 1) * keys * scalar);                  // V^T
  worker += staged_bytes(plan.key_tile, shape.head_dim, geometry);         // K
  worker += align(shape.head_dim * keys * compute);                        // dK^T
  worker += align(shape.value_dim * keys * compute);                       // dV^T
  worker += 2 * align(queries * keys * compute);                           // P, dS
  if (plan.caps_masked_scores) worker += align(queries * keys * compute);  // dS before the cap
  if (geometry.depth == 2) worker += 3 * align(queries * keys * scalar);
  worker += staged_bytes(plan.query_block, shape.head_dim, geometry);   // Q
  worker += staged_bytes(plan.query_block, shape.value_dim, geometry);  // dO
  worker += align((plan.query_block + 64 / 4) * keys * 2);              // dropout bits
  worker += align(keys * compute);                                      // key bias
  worker += align(2 * plan.query_block * geometry.lanes * compute);     // lanes of rows
  worker += 3 * align(shape.q_len * shape.group() * compute);           // reference, factor, delta
  worker += align(ceil_div(shape.q_len, plan.query_block) * shape.group());  // dQ started
  if (plan.chunks == 1) {
    worker += align(shape.q_len * shape.group() * plan.head_stride * compute);  // dQ
  }

  plan.mask_map.offset = 0;
  plan.query_partial_offset = mask_map_bytes(plan.mask_map);
  plan.mask_partial_offset = plan.query_partial_offset;
  if (plan.chunks > 1) {
    plan.mask_partial_offset +=
        align(plan.chunks * plan.pairs * plan.rows_per_pair(shape) * plan.head_stride * compute);
  }
  plan.statistics_offset = plan.mask_partial_offset;
  if (plan.mask_gradient) {
    plan.statistics_offset +=
        align(plan.mask_slices * plan.mask_partials * plan.mask_column_chunks() * plan.mask_heads *
              plan.mask_rows * plan.mask_cols * compute);
  }
  plan.worker_offset =
      plan.statistics_offset + align(2 * shape.batch() * shape.query_heads * shape.q_len * compute);
  plan.worker_bytes = align(worker);
  plan.total_bytes = plan.worker_offset + plan.worker_bytes * num_workers;
  return plan;
}

std::int64_t mask_sharing_pair(const BackwardPlan& plan, const AttentionShape& shape,
                               std::int64_t slice, std::int64_t index) {
  // Mixed radix over (batch dims..., kv_head): the varying dimensions are digits of `slice`, the
  // broadcast ones digits of `index`.
  std::int64_t pair = 0;
  std::int64_t weight = 1;
  const auto take = [&](bool varies, std::int64_t size) {
    std::int64_t& digits = varies ? slice : index;
    pair += digits % size * weight;
    digits /= size;
    weight *= size;
  };
  take(plan.mask_head_varies, shape.kv_heads);
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    take(plan.mask_batch_varies[dim], shape.batch_sizes[dim]);
  }
  return pair;
}

}  // namespace torch_ext
