// Backward attention on the ordinary multiply-add units: a pass over the queries for dQ and one
// over the keys for dK and dV, each sum made by one thread.
#pragma once

#include "attention_row_stats.cuh"
#include "attention_scalar_tile.cuh"

namespace torch_ext::cuda {

/// Weights after dropout and gradients of scores of one (batch, head).
template <typename Element, typename T>
struct ScalarScores {
  using Tile = ScalarTile<Element, T>;
  static constexpr int kRows = Tile::kRows;

  TORCH_EXT_DEVICE ScalarScores(const AttentionBackwardArgs& args_, std::int64_t batch,
                                std::int64_t head)
      : args(args_),
        query(row_source(args.query, args.shape, batch, head)),
        key(row_source(args.key, args.shape, batch, head / args.shape.group)),
        value(row_source(args.value, args.shape, batch, head / args.shape.group)),
        grad_out(row_source(args.grad_out, args.shape, batch, head)),
        slice(batch * args.shape.query_heads + head),
        mask_start(slice_start(args.masking.mask, args.shape, batch, head)),
        padding_start(slice_start(args.masking.padding, args.shape, batch, 0)),
        map(map_start(args.masking.map, args.shape, batch, head)) {}

  /// False, for the whole block, where no pair of the tile attends.
  template <typename Block>
  TORCH_EXT_DEVICE bool compute(Block& block, std::int64_t first_row, std::int64_t first_key,
                                typename Tile::Scores& weights,
                                typename Tile::Scores& grads) const {
    const DeviceShape& shape = args.shape;
    const std::int64_t rows = min_of<std::int64_t>(kRows, shape.q_len - first_row);
    const std::int64_t keys = min_of<std::int64_t>(kRows, shape.kv_len - first_key);
    if (first_key >= args.masking.key_end(first_row + rows - 1, shape.kv_len)) return false;
    if (!(tile_bits(args.masking.map, map, first_row, first_row + rows - 1, 1, first_key,
                    first_key + keys - 1) &
          kSomeAttend)) {
      return false;
    }
    Tile::clear(weights);
    Tile::clear(grads);
    Tile::multiply_rows(block, weights, query, first_row, rows, key, first_key, keys,
                        shape.head_dim);
    Tile::multiply_rows(block, grads, grad_out, first_row, rows, value, first_key, keys,
                        shape.value_dim);
    const T scale = static_cast<T>(args.scale);
    const std::uint64_t seed =
        args.dropout.active ? static_cast<std::uint64_t>(*args.dropout.seed) : 0;
    const T* stats = static_cast<const T*>(args.row_stats) + slice * kRowStats * args.padded_rows;
    TORCH_EXT_UNROLL
    for (int i = 0; i < Tile::kPerThread; ++i) {
      const std::int64_t row = first_row + Tile::y_of(block.thread()) + Tile::kSide * i;
      const RowStats<T> row_stats{stats[row], stats[args.padded_rows + row],
                                  stats[2 * args.padded_rows + row]};
      TORCH_EXT_UNROLL
      for (int j = 0; j < Tile::kPerThread; ++j) {
        const std::int64_t column = first_key + Tile::x_of(block.thread()) + Tile::kSide * j;
        const T score = pair_score<Element>(block, args.masking, shape, weights[i][j], scale, row,
                                            column, mask_start, padding_start);
        const bool kept =
            !args.dropout.active || dropout_keeps(seed, args.dropout.threshold, slice, row, column);
        const WeightAndGradient<T> result = weigh<T, true>(
            block, score, grads[i][j], row_stats, kept, static_cast<T>(args.dropout.scale));
        weights[i][j] = result.weight;
        grads[i][j] = result.grad_score;
      }
    }
    return true;
  }

  const AttentionBackwardArgs& args;
  RowSource query, key, value, grad_out;
  std::int64_t slice;
  std::int64_t mask_start;
  std::int64_t padding_start;
  std::int64_t map;
};

template <typename Element, typename T>
struct AttentionScalarGradQueryProgram {
  using Args = AttentionBackwardArgs;
  using Tile = ScalarTile<Element, T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr int kRows = Tile::kRows;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const std::int64_t row_tiles = (shape.q_len + kRows - 1) / kRows;
    const std::int64_t slices = shape.batch * shape.query_heads;
    const std::int64_t first_row = block.index() % row_tiles * kRows;
    const std::int64_t slice = block.index() / row_tiles % slices;
    const std::int64_t first_out = block.index() / (row_tiles * slices) * Tile::kOutCols;
    const std::int64_t rows = min_of<std::int64_t>(kRows, shape.q_len - first_row);
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const ScalarScores<Element, T> scores(args, batch, head);
    typename Tile::Out out;
    Tile::clear(out);
    const std::int64_t key_end = args.masking.key_end(first_row + rows - 1, shape.kv_len);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t first = 0; first < key_end; first += kRows) {
      typename Tile::Scores weights;
      typename Tile::Scores grads;
      if (!scores.compute(block, first_row, first, weights, grads)) continue;
      block.sync();
      Tile::keep(block, Tile::kGradScores, grads);
      Tile::template multiply_tile<false>(block, out, Tile::kGradScores, scores.key, first,
                                          min_of<std::int64_t>(kRows, shape.kv_len - first),
                                          first_out, shape.head_dim);
    }
    Tile::store(block, out, args.grad_query, slice_start(args.grad_query, shape, batch, head),
                first_row, rows, first_out, shape.head_dim, static_cast<T>(args.scale),
                args.unrounded_grads);
  }
};

template <typename Element, typename T>
struct AttentionScalarGradKeysProgram {
  using Args = AttentionBackwardArgs;
  using Tile = ScalarTile<Element, T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr int kRows = Tile::kRows;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const std::int64_t key_tiles = (shape.kv_len + kRows - 1) / kRows;
    const std::int64_t pairs = shape.batch * shape.kv_heads;
    const std::int64_t first_key = block.index() % key_tiles * kRows;
    const std::int64_t pair = block.index() / key_tiles % pairs;
    const std::int64_t first_out = block.index() / (key_tiles * pairs) * Tile::kOutCols;
    const std::int64_t keys = min_of<std::int64_t>(kRows, shape.kv_len - first_key);
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t kv_head = pair % shape.kv_heads;
    typename Tile::Out grad_key;
    typename Tile::Out grad_value;
    Tile::clear(grad_key);
    Tile::clear(grad_value);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t g = 0; g < shape.group; ++g) {
      const ScalarScores<Element, T> scores(args, batch, kv_head * shape.group + g);
      TORCH_EXT_NO_UNROLL
      for (std::int64_t first = 0; first < shape.q_len; first += kRows) {
        typename Tile::Scores weights;
        typename Tile::Scores grads;
        if (!scores.compute(block, first, first_key, weights, grads)) continue;
        block.sync();
        Tile::keep(block, Tile::kWeights, weights);
        Tile::keep(block, Tile::kGradScores, grads);
        const std::int64_t rows = min_of<std::int64_t>(kRows, shape.q_len - first);
        Tile::template multiply_tile<true>(block, grad_value, Tile::kWeights, scores.grad_out,
                                           first, rows, first_out, shape.value_dim);
        Tile::template multiply_tile<true>(block, grad_key, Tile::kGradScores, scores.query, first,
                                           rows, first_out, shape.head_dim);
      }
    }
    if (args.grad_key.data != nullptr) {
      Tile::store(block, grad_key, args.grad_key, slice_start(args.grad_key, shape, batch, kv_head),
                  first_key, keys, first_out, shape.head_dim, static_cast<T>(args.scale),
                  args.unrounded_grads);
    }
    if (args.grad_value.data != nullptr) {
      Tile::store(block, grad_value, args.grad_value,
                  slice_start(args.grad_value, shape, batch, kv_head), first_key, keys, first_out,
                  shape.value_dim, static_cast<T>(args.dropout.scale), args.unrounded_grads);
    }
  }
};

}  // namespace torch_ext::cuda
