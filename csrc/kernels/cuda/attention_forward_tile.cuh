// FlashAttention (Dao, arXiv 2307.08691) on tensor cores: a block takes a tile of queries and
// streams the keys through shared memory, values landing while scores are computed, the next keys
// while weights meet values.
#pragma once

#include "attention_row_tile.cuh"
#include "attention_score_tile.cuh"
#include "element_store.cuh"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

/// kGeneral: masks, dropout, rows of any alignment and any scale, decided at run time; else causal
/// or not, and scale > 0.
template <typename Element_, int kDim_, bool kGeneral_>
struct AttentionForwardProgram {
  using Args = AttentionForwardArgs;
  using Element = Element_;
  static constexpr int kDim = kDim_;  // head_dim and value_dim, padded
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMTiles = kDim <= (kGeneral ? 64 : 128) ? 2 : 1;  // of 16 rows, per warp
  static constexpr int kRows = kWarps * kMTiles * 16;
  static constexpr int kKeys = kMapTile;
  static constexpr int kScoreTiles = kKeys / 8;
  static constexpr int kOutTiles = kDim / 8;
  static constexpr int kQueryBytes = kRows * kDim * kElementBytes<Element>;
  static constexpr int kKeyBytes = kKeys * kDim * kElementBytes<Element>;
  static constexpr std::uint32_t kPlace = kQueryBytes + 2 * kKeyBytes;  // kGeneral: a RowTile
  static constexpr int kSharedBytes = static_cast<int>(kPlace + (kGeneral ? sizeof(RowTile) : 0));
  static constexpr int kBlocksPerUnit = kDim <= 128 ? 2 : 1;

  using Score = ScoreTile<Element, kMTiles, kScoreTiles>;
  using Scores = typename Score::Scores;
  using Out = Accumulators<kMTiles, kOutTiles>;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    if constexpr (kGeneral) {
      auto& tile = block.template shared<RowTile>(kPlace);
      if (block.thread() == 0) tile = locate_row_tile(args, block.index(), kRows);
      block.sync();
      run(block, args, tile);
    } else {
      // In registers: without options there are enough.
      run(block, args, locate_row_tile(args, block.index(), kRows));
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args, const RowTile& tile) {
    constexpr std::uint32_t kKeyTile = kQueryBytes;
    constexpr std::uint32_t kValueTile = kQueryBytes + kKeyBytes;
    const DeviceShape& shape = args.shape;
    const int head_dim = static_cast<int>(shape.head_dim);
    const int value_dim = static_cast<int>(shape.value_dim);

    const auto next_tile = [&](int first) {
      if constexpr (kGeneral) {
        while (first < tile.key_end && !(tile_bits(args.masking.map, tile.map, tile.first_query,
                                                   tile.last_query, tile.pack, first, first) &
                                         kSomeAttend)) {
          first += kKeys;
        }
      }
      return first;
    };
    const auto load_keys = [&](std::uint32_t target, const DeviceView& view, std::int64_t start,
                               int first, int cols) {
      const int count = static_cast<int>(min_of<std::int64_t>(kKeys, shape.kv_len - first));
      load_tile<Element, kKeys, kDim, kThreads, kGeneral>(
          block, target, view, start + first * view.row_stride, count, cols);
      block.commit_copies();
    };

    OnlineSoftmax<kMTiles> softmax;
    softmax.start();
    Out out;
    clear<kMTiles, kOutTiles>(out);
    const float factor = static_cast<float>(args.unit * kLog2eDouble);

    int first = next_tile(tile.key_begin);
    if (first < tile.key_end) {
      load_rows<Element, kRows, kDim, kThreads, kGeneral>(
          block, 0, args.query, slice_start(args.query, shape, tile.batch, tile.first_head),
          tile.rows, head_dim, [&](int row) { return tile.row_offset(args.query, row); });
      load_keys(kKeyTile, args.key, tile.key_start, first, head_dim);
    }
    TORCH_EXT_NO_UNROLL
    while (first < tile.key_end) {
      block.template wait_copies<0>();
      block.sync();  // keys are here, and nobody reads the last values any more
      load_keys(kValueTile, args.value, tile.value_start, first, value_dim);
      const int warp_row = first_row_of_warp(block);
      Scores scores;
      clear<kMTiles, kScoreTiles>(scores);
      multiply_rows<Element, kDim, kMTiles, kScoreTiles>(block, scores, 0, warp_row, kKeyTile, 0);
      const int next = next_tile(first + kKeys);
      block.template wait_copies<0>();
      block.sync();  // values are here, and nobody reads these keys any more
      if (next < tile.key_end) load_keys(kKeyTile, args.key, tile.key_start, next, head_dim);

      const Score score{shape, args.masking, args.dropout, tile, warp_row};
      if constexpr (kGeneral) {
        score.modify(block,
                     tile_bits(args.masking.map, tile.map, tile.first_query, tile.last_query,
                               tile.pack, first, first),
                     first, static_cast<float>(args.scale), scores);
        softmax.update(block, scores, factor, out);
        if (args.dropout.active) {
          score.for_kept(block, first, [&](int m, int n, int e, bool kept) {
            if (!kept) scores[m][n][e] = 0.0f;
          });
        }
      } else {
        if (first + kKeys > min_of(tile.all_key_end, tile.key_end)) {
          score.mask_ends(block, first, scores);
        }
        softmax.update(block, scores, factor, out);
      }
      multiply_weights<Element, kDim, kMTiles, kScoreTiles, kOutTiles>(block, out, scores,
                                                                       kValueTile, 0, 0);
      first = next;
    }
    softmax.finish(block);
    if constexpr (kGeneral) {
      store(block, args, tile, first_row_of_warp(block), softmax, out);
    } else {
      store(block, args, locate_row_tile(args, block.anew(block.index()), kRows),
            first_row_of_warp(block), softmax, out);
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static int first_row_of_warp(Block& block) {
    return block.anew(block.thread()) / kWarpSize * kMTiles * 16;
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void store(Block& block, const Args& args, const RowTile& tile,
                                     int warp_row, const OnlineSoftmax<kMTiles>& softmax,
                                     const Out& out) {
    const int value_dim = static_cast<int>(args.shape.value_dim);
    const int column = block.thread() % 4 * 2;
    const Score score{args.shape, args.masking, args.dropout, tile, warp_row};
    const std::int64_t out_start = slice_start(args.out, args.shape, tile.batch, tile.first_head);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = score.row_of(block, m, half);
        if (row >= tile.rows) continue;
        const float maximum = softmax.maximum[m][half];
        const float sum = softmax.sum[m][half];
        if (args.partial_out != nullptr) {
          float* partial =
              static_cast<float*>(args.partial_out) + partial_row(args, tile, row) * value_dim;
          TORCH_EXT_UNROLL
          for (int n = 0; n < kOutTiles; ++n) {
            TORCH_EXT_UNROLL
            for (int e = 0; e < 2; ++e) {
              if (column + 8 * n + e < value_dim) {
                partial[column + 8 * n + e] = out[m][n][2 * half + e];
              }
            }
          }
        } else {
          const float inverse = sum == 0.0f ? 0.0f : static_cast<float>(args.dropout.scale) / sum;
          const std::int64_t row_start = out_start + tile.row_offset(args.out, row);
          TORCH_EXT_UNROLL
          for (int n = 0; n < kOutTiles; ++n) {
            store_pair<Element>(block, args.out, row_start, column + 8 * n, value_dim,
                                out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
          }
        }
        if (column == 0) store_row_stats(block, args, tile, row, maximum, sum);
      }
    }
  }
};

}  // namespace torch_ext::cuda
