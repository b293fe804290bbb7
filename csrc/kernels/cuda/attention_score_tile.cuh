// Scores of a tile of queries in the fragments of the tensor cores, and what masks and dropout do
// to them.
#pragma once

#include "device_attention.h"
#include "dropout_bits.cuh"
#include "online_softmax.cuh"
#include "score_mask.cuh"
#include "tensor_core_tile.cuh"

namespace torch_ext::cuda {

/// Some rows of one (batch, head), or of `pack` heads that share a kv head. Row r is query r / pack
/// of head first_head + r % pack. Programs whose registers are scarce keep it in shared memory.
struct RowTile {
  std::int64_t slice;
  std::int64_t split;
  std::int64_t batch;
  std::int64_t first_head;
  std::int64_t kv_head;
  // Elements of (batch, first_head), or kv_head.
  std::int64_t key_start;
  std::int64_t value_start;
  std::int64_t mask_start;
  std::int64_t padding_start;
  std::int64_t map;
  int pack;
  int first_row;
  int rows;
  int first_query;
  int last_query;
  int key_begin;
  int key_end;      // of the last row
  int all_key_end;  // of the first one: the keys before it are allowed for every row

  /// From batch, first_head and kv_head. Args: of either pass.
  template <typename Args>
  TORCH_EXT_DEVICE void locate_starts(const Args& args) {
    key_start = slice_start(args.key, args.shape, batch, kv_head);
    value_start = slice_start(args.value, args.shape, batch, kv_head);
    mask_start = slice_start(args.masking.mask, args.shape, batch, first_head);
    padding_start = slice_start(args.masking.padding, args.shape, batch, 0);
    map = map_start(args.masking.map, args.shape, batch, first_head);
  }

  TORCH_EXT_DEVICE int query_of(int row) const {
    return pack == 1 ? first_row + row : (first_row + row) / pack;
  }
  TORCH_EXT_DEVICE int head_of(int row) const { return pack == 1 ? 0 : (first_row + row) % pack; }
  template <typename View>
  TORCH_EXT_DEVICE std::int64_t row_offset(const View& view, int row) const {
    return head_of(row) * view.head_stride + query_of(row) * view.row_stride;
  }
};

/// Accumulators of (16 kMTiles, 8 kNTiles) scores: this warp's rows from warp_row on, keys from a
/// first one, a multiple of 8, on.
template <typename Element, int kMTiles, int kNTiles>
struct ScoreTile {
  using Scores = Accumulators<kMTiles, kNTiles>;

  const DeviceShape& shape;
  const DeviceMasking& masking;
  const DeviceDropout& dropout;
  const RowTile& tile;
  int warp_row;

  /// This thread's row, within the tile, of accumulators [m][.][2 * half].
  template <typename Block>
  TORCH_EXT_DEVICE int row_of(Block& block, int m, int half) const {
    return warp_row + 16 * m + 8 * half + block.thread() % kWarpSize / 4;
  }

  /// Keys beyond each row's end.
  template <typename Block>
  TORCH_EXT_DEVICE void mask_ends(Block& block, int first_key, Scores& scores) const {
    const int column = first_key + block.anew(block.thread()) % 4 * 2;
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int query = tile.query_of(row_of(block, m, half));
        const int end =
            min_of(static_cast<int>(masking.key_end(query, shape.kv_len)), tile.key_end);
        TORCH_EXT_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          TORCH_EXT_UNROLL
          for (int e = 0; e < 2; ++e) {
            if (column + 8 * n + e >= end) scores[m][n][2 * half + e] = -infinity<float>();
          }
        }
      }
    }
  }

  /// Scores are natural ones.
  template <typename Block>
  TORCH_EXT_DEVICE void add_masks(Block& block, int first_key, Scores& scores) const {
    const int column = first_key + block.thread() % 4 * 2;
    with_mask_type<Element>(masking, [&](auto mask) {
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        TORCH_EXT_UNROLL
        for (int half = 0; half < 2; ++half) {
          // Rows beyond the tile repeat its last one: every address stays valid.
          const int row = min_of(row_of(block, m, half), tile.rows - 1);
          const std::int64_t row_start = tile.mask_start + tile.row_offset(masking.mask, row);
          TORCH_EXT_UNROLL
          for (int n = 0; n < kNTiles; ++n) {
            TORCH_EXT_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int key = column + 8 * n + e;
              if (key >= shape.kv_len) continue;
              float& score = scores[m][n][2 * half + e];
              score = masked_score(block, masking, mask, score,
                                   row_start + key * masking.mask.col_stride);
              score = padded_score(block, masking, score,
                                   tile.padding_start + key * masking.padding.col_stride);
            }
          }
        }
      }
    });
  }

  /// Makes natural scores of products and masks them. bits: of the map's tile around them. Returns
  /// whether any may be masked.
  template <typename Block>
  TORCH_EXT_DEVICE bool modify(Block& block, std::uint32_t bits, int first_key, float scale,
                               Scores& scores) const {
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) scores[m][n][e] = block.product(scores[m][n][e], scale);
      }
    }
    const bool masked = (bits & kSomeMasked) != 0 || masking.kind == AttentionMaskKind::kAdditive;
    if (masked) add_masks(block, first_key, scores);
    const bool bounded = first_key + 8 * kNTiles > min_of(tile.all_key_end, tile.key_end);
    if (bounded) mask_ends(block, first_key, scores);
    return masked || bounded;
  }

  /// visit(m, n, e, kept) for each accumulator. Dropout is active.
  template <typename Block, typename Visit>
  TORCH_EXT_DEVICE void for_kept(Block& block, int first_key, Visit visit) const {
    const std::int64_t first_slice = tile.batch * shape.query_heads + tile.first_head;
    for_kept_keys<kMTiles, kNTiles>(
        block, static_cast<std::uint64_t>(*dropout.seed), dropout.threshold, first_key,
        [&](int m, int half) {
          return static_cast<std::uint32_t>(tile.query_of(row_of(block, m, half)));
        },
        [&](int m, int half) {
          return static_cast<std::uint32_t>(first_slice + tile.head_of(row_of(block, m, half)));
        },
        visit);
  }
};

}  // namespace torch_ext::cuda
