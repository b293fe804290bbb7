// Gradients of scores, a tile of queries by a tile of keys: what the passes outside the one over
// the keys are made of. On tensor cores; attention_scalar_backward.cuh has the twin on ordinary
// units.
#pragma once

#include "attention_row_stats.cuh"
#include "attention_score_tile.cuh"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

template <typename Element_, int kDim_>
struct ScoreGradientTile {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarps * 16;
  static constexpr int kDimBytes = kDim * kElementBytes<Element>;
  static constexpr int kKeys = kDimBytes <= 256 ? 64 : 32;
  static constexpr int kScoreTiles = kKeys / 8;
  static constexpr int kRowBytes = kRows * kDimBytes;
  static constexpr int kKeyBytes = kKeys * kDimBytes;
  static constexpr std::uint32_t kQueryTile = 0;
  static constexpr std::uint32_t kGradOutTile = kRowBytes;
  static constexpr std::uint32_t kKeyTile = 2 * kRowBytes;
  static constexpr std::uint32_t kValueTile = 2 * kRowBytes + kKeyBytes;
  static constexpr int kSharedBytes = 2 * (kRowBytes + kKeyBytes);

  using Score = ScoreTile<Element, 1, kScoreTiles>;
  using Scores = typename Score::Scores;

  TORCH_EXT_DEVICE static RowTile row_tile(const AttentionBackwardArgs& args, std::int64_t batch,
                                           std::int64_t head, std::int64_t number) {
    const DeviceShape& shape = args.shape;
    RowTile tile{};
    tile.batch = batch;
    tile.first_head = head;
    tile.kv_head = head / shape.group;
    tile.pack = 1;
    tile.first_row = static_cast<int>(number * kRows);
    tile.rows = static_cast<int>(min_of<std::int64_t>(kRows, shape.q_len - tile.first_row));
    tile.first_query = tile.first_row;
    tile.last_query = tile.first_row + tile.rows - 1;
    tile.key_end = static_cast<int>(args.masking.key_end(tile.last_query, shape.kv_len));
    tile.all_key_end = static_cast<int>(args.masking.key_end(tile.first_query, shape.kv_len));
    tile.locate_starts(args);
    return tile;
  }

  TORCH_EXT_DEVICE static std::uint32_t bits_of(const AttentionBackwardArgs& args,
                                                const RowTile& tile, int first_key) {
    return tile_bits(args.masking.map, tile.map, tile.first_query, tile.last_query, 1, first_key,
                     first_key);
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void load_row_side(Block& block, const AttentionBackwardArgs& args,
                                             const RowTile& tile) {
    const auto load = [&](std::uint32_t target, const DeviceView& view, std::int64_t cols) {
      load_tile<Element, kRows, kDim, kThreads, true>(
          block, target, view,
          slice_start(view, args.shape, tile.batch, tile.first_head) +
              tile.first_row * view.row_stride,
          tile.rows, static_cast<int>(cols));
    };
    load(kQueryTile, args.query, args.shape.head_dim);
    load(kGradOutTile, args.grad_out, args.shape.value_dim);
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void load_key_side(Block& block, const AttentionBackwardArgs& args,
                                             const RowTile& tile, int first_key) {
    const int count = static_cast<int>(min_of<std::int64_t>(kKeys, args.shape.kv_len - first_key));
    const auto load = [&](std::uint32_t target, const DeviceView& view, std::int64_t start,
                          std::int64_t cols) {
      load_tile<Element, kKeys, kDim, kThreads, true>(
          block, target, view, start + first_key * view.row_stride, count, static_cast<int>(cols));
    };
    load(kKeyTile, args.key, tile.key_start, args.shape.head_dim);
    load(kValueTile, args.value, tile.value_start, args.shape.value_dim);
  }

  /// dS of this warp's 16 rows, from the tiles in shared memory.
  template <typename Block>
  TORCH_EXT_DEVICE static void compute(Block& block, const AttentionBackwardArgs& args,
                                       const RowTile& tile, std::uint32_t bits, int first_key,
                                       Scores& grads) {
    const int warp_row = block.thread() / kWarpSize * 16;
    Scores scores;
    clear<1, kScoreTiles>(scores);
    multiply_rows<Element, kDim, 1, kScoreTiles>(block, scores, kQueryTile, warp_row, kKeyTile, 0);
    clear<1, kScoreTiles>(grads);
    multiply_rows<Element, kDim, 1, kScoreTiles>(block, grads, kGradOutTile, warp_row, kValueTile,
                                                 0);
    const Score score{args.shape, args.masking, args.dropout, tile, warp_row};
    score.modify(block, bits, first_key, static_cast<float>(args.scale), scores);
    RowStats<float> row_stats[2];
    const std::int64_t slice = tile.batch * args.shape.query_heads + tile.first_head;
    const float* stats = static_cast<const float*>(args.row_stats) +
                         slice * kRowStats * args.padded_rows + tile.first_row;
    TORCH_EXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = score.row_of(block, 0, half);
      row_stats[half] = {stats[row], stats[args.padded_rows + row],
                         stats[2 * args.padded_rows + row]};
    }
    const auto weigh_one = [&](int n, int e, bool kept, float keep_scale) {
      grads[0][n][e] = weigh<float, true>(block, scores[0][n][e], grads[0][n][e], row_stats[e / 2],
                                          kept, keep_scale)
                           .grad_score;
    };
    if (args.dropout.active) {
      const float keep_scale = static_cast<float>(args.dropout.scale);
      score.for_kept(block, first_key,
                     [&](int, int n, int e, bool kept) { weigh_one(n, e, kept, keep_scale); });
      return;
    }
    TORCH_EXT_UNROLL
    for (int n = 0; n < kScoreTiles; ++n) {
      TORCH_EXT_UNROLL
      for (int e = 0; e < 4; ++e) weigh_one(n, e, true, 1.0f);
    }
  }
};

/// dQ = scale dS K in a pass of its own over the queries: no two blocks add to one place.
template <typename Element_, int kDim_>
struct AttentionGradQueryProgram {
  using Args = AttentionBackwardArgs;
  using Element = Element_;
  using Tile = ScoreGradientTile<Element, kDim_>;
  static constexpr int kDim = kDim_;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr std::uint32_t kPlace = Tile::kSharedBytes;  // a RowTile
  static constexpr int kSharedBytes = static_cast<int>(kPlace + sizeof(RowTile));
  static constexpr int kBlocksPerUnit = Tile::kDimBytes <= 256 ? 2 : 1;
  static constexpr int kOutTiles = kDim / 8;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    auto& tile = block.template shared<RowTile>(kPlace);
    if (block.thread() == 0) {
      const std::int64_t row_tiles = (args.shape.q_len + Tile::kRows - 1) / Tile::kRows;
      const std::int64_t slice = block.index() / row_tiles;
      tile = Tile::row_tile(args, slice / args.shape.query_heads, slice % args.shape.query_heads,
                            row_tiles - 1 - block.index() % row_tiles);
    }
    block.sync();
    Accumulators<1, kOutTiles> out;
    clear<1, kOutTiles>(out);
    Tile::load_row_side(block, args, tile);
    TORCH_EXT_NO_UNROLL
    for (int first = 0; first < tile.key_end; first += Tile::kKeys) {
      const std::uint32_t bits = Tile::bits_of(args, tile, first);
      if (!(bits & kSomeAttend)) continue;
      block.sync();  // nobody reads the last keys any more
      Tile::load_key_side(block, args, tile, first);
      block.commit_copies();
      block.template wait_copies<0>();
      block.sync();
      typename Tile::Scores grads;
      Tile::compute(block, args, tile, bits, first, grads);
      multiply_weights<Element, kDim, 1, Tile::kScoreTiles, kOutTiles>(block, out, grads,
                                                                       Tile::kKeyTile, 0, 0);
    }
    block.template wait_copies<0>();
    const int lane = block.thread() % kWarpSize;
    const std::int64_t start =
        slice_start(args.grad_query, args.shape, tile.batch, tile.first_head);
    const float factor = static_cast<float>(args.scale);
    TORCH_EXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = block.thread() / kWarpSize * 16 + 8 * half + lane / 4;
      if (row >= tile.rows) continue;
      TORCH_EXT_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        store_gradient_pair<Element>(block, args, args.grad_query,
                                     start + (tile.first_row + row) * args.grad_query.row_stride,
                                     8 * n + lane % 4 * 2, static_cast<int>(args.shape.head_dim),
                                     out[0][n][2 * half] * factor,
                                     out[0][n][2 * half + 1] * factor);
      }
    }
  }
};

}  // namespace torch_ext::cuda
