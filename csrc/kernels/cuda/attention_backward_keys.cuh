// FlashAttention's backward pass on tensor cores: a block takes a tile of keys and streams the
// queries of all heads that share them. Scores are computed transposed,
//   S^T (keys, queries) = K Q^T,  dP^T = V dO^T,
// so that P^T and dS^T leave the accumulators as left operands of dV += P^T dO and dK += dS^T Q;
// dS^T goes through shared memory once, for dQ += dS K.
#pragma once

#include "attention_grad_query_sum.cuh"
#include "attention_key_scores.cuh"
#include "attention_key_tile.cuh"
#include "tensor_core_tile.cuh"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

template <typename Element_, int kDim_, bool kGeneral_>
struct AttentionBackwardKeysProgram {
  using Args = AttentionBackwardArgs;
  using Tile = AttentionKeyTile<Element_, kDim_, kGeneral_>;
  using Element = Element_;
  using Step = typename Tile::Step;
  using Gradient = typename Tile::Gradient;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = kSharedBytes > 113 * 1024 ? 1 : 2;
  static constexpr int kKeys = Tile::kKeys;
  static constexpr int kQueries = Tile::kQueries;
  static constexpr int kMTiles = Tile::kMTiles;
  static constexpr int kScoreTiles = Tile::kScoreTiles;
  static constexpr int kOwnTiles = Tile::kOwnTiles;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    auto& place = block.template shared<KeyTilePlace>(Tile::kPlace);
    if (block.thread() == 0) place = Tile::locate(args, block.index());
    block.sync();
    const int warp = block.thread() / kWarpSize;
    const int key_row = warp / Tile::kDimParts * kMTiles * 16;
    const int own_col = warp % Tile::kDimParts * Tile::kOwnCols;
    const int head_dim = static_cast<int>(shape.head_dim);
    const int value_dim = static_cast<int>(shape.value_dim);

    Gradient grad_key;
    Gradient grad_value;
    clear<kMTiles, kOwnTiles>(grad_key);
    clear<kMTiles, kOwnTiles>(grad_value);
    const int heads = static_cast<int>(shape.group);
    Step step = Tile::settle(args, place, 0, place.first_tile);
    if (step.head < heads) {
      const auto load_keys = [&](std::uint32_t target, const DeviceView& view, int cols) {
        load_tile<Element, kKeys, kDim, kThreads, kGeneral>(
            block, target, view,
            slice_start(view, shape, place.batch, place.kv_head) +
                place.first_key * view.row_stride,
            place.keys, cols);
      };
      load_keys(Tile::kKeyTile, args.key, head_dim);
      load_keys(Tile::kValueTile, args.value, value_dim);
      load_queries(block, args, step, 0);
      load_grad_out(block, args, step);
    }
    const AttentionKeyScores<Tile> scores{args, place, key_row};
    std::uint32_t stage = 0;
    TORCH_EXT_NO_UNROLL
    while (step.head < heads) {
      const Step next = Tile::settle(args, place, step.head, step.tile + 1);
      block.template wait_copies<0>();
      block.sync();  // this step's tiles are here, and nobody reads the last dS or queries any more
      if (next.head < heads) load_queries(block, args, next, stage ^ 1);
      const std::uint32_t query_tile = Tile::kQueryTile + stage * Tile::kQueryBytes;
      TORCH_EXT_NO_UNROLL
      for (int chunk = 0; chunk < kQueries; chunk += Tile::kChunk) {
        typename Tile::Scores weights;
        typename Tile::Scores grad_scores;
        clear<kMTiles, kScoreTiles>(weights);
        multiply_rows<Element, kDim, kMTiles, kScoreTiles>(block, weights, Tile::kKeyTile, key_row,
                                                           query_tile, chunk);
        clear<kMTiles, kScoreTiles>(grad_scores);
        multiply_rows<Element, kDim, kMTiles, kScoreTiles>(block, grad_scores, Tile::kValueTile,
                                                           key_row, Tile::kGradOutTile, chunk);
        scores.weigh(
            block, step, step.first_query() + chunk,
            Tile::kStats + stage * Tile::kStatsBytes + static_cast<std::uint32_t>(chunk * 4),
            weights, grad_scores);
        multiply_weights<Element, kDim, kMTiles, kScoreTiles, kOwnTiles>(
            block, grad_value, weights, Tile::kGradOutTile, chunk, own_col);
        multiply_weights<Element, kDim, kMTiles, kScoreTiles, kOwnTiles>(
            block, grad_key, grad_scores, query_tile, chunk, own_col);
        if (args.grad_query_sum != nullptr && own_col == 0) {
          scores.keep(block, chunk, grad_scores);
        }
      }
      block.sync();  // dS is here, and nobody reads grad_out any more
      if (next.head < heads) load_grad_out(block, args, next);
      if (args.grad_query_sum != nullptr) add_grad_query(block, args, step, warp);
      step = next;
      stage ^= 1;
    }
    store(block, args, args.grad_key, place, key_row, own_col, head_dim,
          static_cast<float>(args.scale), grad_key);
    store(block, args, args.grad_value, place, key_row, own_col, value_dim,
          static_cast<float>(args.dropout.scale), grad_value);
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void load_queries(Block& block, const Args& args, const Step& step,
                                            std::uint32_t stage) {
    const auto& place = block.template shared<KeyTilePlace>(Tile::kPlace);
    load_tile<Element, kQueries, kDim, kThreads, kGeneral>(
        block, Tile::kQueryTile + stage * Tile::kQueryBytes, args.query,
        place.query + step.head * args.query.head_stride +
            step.first_query() * args.query.row_stride,
        step.queries(args.shape), static_cast<int>(args.shape.head_dim));
    constexpr int kStatChunks = kQueries * 4 / kCopyBytes;
    const int thread = block.anew(block.thread());
    if (thread < kRowStats * kStatChunks) {
      const int which = thread / kStatChunks;
      const int chunk = thread % kStatChunks;
      const float* stats = static_cast<const float*>(args.row_stats) +
                           ((place.slice + step.head) * kRowStats + which) * args.padded_rows +
                           step.first_query() + chunk * 4;
      block.copy_async(Tile::kStats + stage * Tile::kStatsBytes +
                           static_cast<std::uint32_t>((which * kQueries + chunk * 4) * 4),
                       stats, true);
    }
    block.commit_copies();
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void load_grad_out(Block& block, const Args& args, const Step& step) {
    load_tile<Element, kQueries, kDim, kThreads, kGeneral>(
        block, Tile::kGradOutTile, args.grad_out,
        block.template shared<KeyTilePlace>(Tile::kPlace).grad_out +
            step.head * args.grad_out.head_stride + step.first_query() * args.grad_out.row_stride,
        step.queries(args.shape), static_cast<int>(args.shape.value_dim));
    block.commit_copies();
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void add_grad_query(Block& block, const Args& args, const Step& step,
                                              int warp) {
    constexpr int kSumTiles = Tile::kSumTiles;
    const int lane = block.thread() % kWarpSize;
    const int tile = warp % Tile::kQueryTiles;
    const int first_col = warp / Tile::kQueryTiles * Tile::kSumCols;
    float sum[kSumTiles][4];
    TORCH_EXT_UNROLL
    for (int n = 0; n < kSumTiles; ++n) {
      TORCH_EXT_UNROLL
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    multiply_columns<Element, kKeys, Tile::kGradCols, kDim, kSumTiles>(
        block, sum, Tile::kGradScoreTile, tile * 16, Tile::kKeyTile, first_col);
    const std::int64_t slice = block.template shared<KeyTilePlace>(Tile::kPlace).slice + step.head;
    float* target =
        args.grad_query_sum +
        ((slice * (args.padded_rows / 16) + step.first_query() / 16 + tile) * (kDim / 8) +
         first_col / 8) *
            128;
    TORCH_EXT_UNROLL
    for (int n = 0; n < kSumTiles; ++n) {
      if constexpr (Block::kWideAtomics) {
        block.add_global(target + n * 128 + sum_place<true>(lane, 0), sum[n]);
      } else {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          block.add_global(target + n * 128 + sum_place<false>(lane, e), sum[n][e]);
        }
      }
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void store(Block& block, const Args& args, const DeviceOutput& view,
                                     const KeyTilePlace& place, int key_row, int first_col,
                                     int cols, float factor, const Gradient& gradient) {
    if (view.data == nullptr) return;
    const int lane = block.thread() % kWarpSize;
    const std::int64_t start = slice_start(view, args.shape, place.batch, place.kv_head);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = key_row + 16 * m + 8 * half + lane / 4;
        if (row >= place.keys) continue;
        TORCH_EXT_UNROLL
        for (int n = 0; n < kOwnTiles; ++n) {
          store_gradient_pair<Element>(
              block, args, view, start + (place.first_key + row) * view.row_stride,
              first_col + 8 * n + lane % 4 * 2, cols, gradient[m][n][2 * half] * factor,
              gradient[m][n][2 * half + 1] * factor);
        }
      }
    }
  }
};

}  // namespace torch_ext::cuda
