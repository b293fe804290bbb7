// Forward attention on the ordinary multiply-add units. A block takes a tile of queries and up to
// 128 columns of value_dim; wider values compute the scores again for each 128.
#pragma once

#include "attention_scalar_tile.cuh"

namespace torch_ext::cuda {

/// Expects pack = 1 and splits = 1.
template <typename Element, typename T>
struct AttentionScalarForwardProgram {
  using Args = AttentionForwardArgs;
  using Tile = ScalarTile<Element, T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr int kRows = Tile::kRows;
  static constexpr int kPerThread = Tile::kPerThread;
  static constexpr int kSide = Tile::kSide;

  /// Blocks of a call.
  static std::int64_t dim_chunks(std::int64_t value_dim) {
    return value_dim <= Tile::kOutCols ? 1 : (value_dim + Tile::kOutCols - 1) / Tile::kOutCols;
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const DeviceMasking& masking = args.masking;
    std::int64_t number = block.index() % args.row_tiles;
    if (masking.is_causal) number = args.row_tiles - 1 - number;
    const std::int64_t slice = block.index() / args.row_tiles % args.slices();
    const std::int64_t chunk = block.index() / (args.row_tiles * args.slices());
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const std::int64_t first_row = number * kRows;
    const std::int64_t rows = min_of<std::int64_t>(kRows, shape.q_len - first_row);
    const std::int64_t first_out = chunk * Tile::kOutCols;
    const RowSource query = row_source(args.query, shape, batch, head);
    const RowSource key = row_source(args.key, shape, batch, head / shape.group);
    const RowSource value = row_source(args.value, shape, batch, head / shape.group);
    const std::int64_t mask_start = slice_start(masking.mask, shape, batch, head);
    const std::int64_t padding_start = slice_start(masking.padding, shape, batch, 0);
    const std::int64_t map = map_start(masking.map, shape, batch, head);
    const std::uint64_t seed =
        args.dropout.active ? static_cast<std::uint64_t>(*args.dropout.seed) : 0;
    const T scale = static_cast<T>(args.scale);
    constexpr T kExponent = static_cast<T>(kLog2eDouble);
    const int y = Tile::y_of(block.thread());
    const int x = Tile::x_of(block.thread());

    T maximum[kPerThread];
    T sum[kPerThread];
    for (int i = 0; i < kPerThread; ++i) {
      maximum[i] = -infinity<T>();
      sum[i] = T{0};
    }
    typename Tile::Out out;
    Tile::clear(out);
    const std::int64_t key_end = masking.key_end(first_row + rows - 1, shape.kv_len);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t first = 0; first < key_end; first += kRows) {
      const std::int64_t count = min_of<std::int64_t>(kRows, shape.kv_len - first);
      if (!(tile_bits(masking.map, map, first_row, first_row + rows - 1, 1, first,
                      first + count - 1) &
            kSomeAttend)) {
        continue;
      }
      typename Tile::Scores scores;
      Tile::clear(scores);
      Tile::multiply_rows(block, scores, query, first_row, rows, key, first, count, shape.head_dim);
      TORCH_EXT_UNROLL
      for (int i = 0; i < kPerThread; ++i) {
        const std::int64_t row = first_row + y + kSide * i;
        T best = -infinity<T>();
        TORCH_EXT_UNROLL
        for (int j = 0; j < kPerThread; ++j) {
          const std::int64_t column = first + x + kSide * j;
          scores[i][j] = pair_score<Element>(block, masking, shape, scores[i][j], scale, row,
                                             column, mask_start, padding_start);
          best = max_of(best, scores[i][j]);
        }
        best = Tile::across_columns(block, best, [](T a, T b) { return max_of(a, b); });
        best = max_of(best, maximum[i]);
        const T reference = best == -infinity<T>() ? T{0} : best;
        const T shrink = block.exp2((maximum[i] - reference) * kExponent);
        maximum[i] = best;
        sum[i] *= shrink;
        TORCH_EXT_UNROLL
        for (int j = 0; j < Tile::kOutPerThread; ++j) out[i][j] *= shrink;
        T tile_sum = T{0};
        TORCH_EXT_UNROLL
        for (int j = 0; j < kPerThread; ++j) {
          T weight = block.exp2((scores[i][j] - reference) * kExponent);
          tile_sum += weight;
          if (args.dropout.active &&
              !dropout_keeps(seed, args.dropout.threshold, slice, row, first + x + kSide * j)) {
            weight = T{0};
          }
          scores[i][j] = weight;
        }
        sum[i] += tile_sum;
      }
      block.sync();
      Tile::keep(block, Tile::kWeights, scores);
      Tile::template multiply_tile<false>(block, out, Tile::kWeights, value, first, count,
                                          first_out, shape.value_dim);
    }
    const std::int64_t out_start = slice_start(args.out, shape, batch, head);
    TORCH_EXT_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const T total = Tile::across_columns(block, sum[i], [](T a, T b) { return a + b; });
      const T inverse = total == T{0} ? T{0} : static_cast<T>(args.dropout.scale) / total;
      TORCH_EXT_UNROLL
      for (int j = 0; j < Tile::kOutPerThread; ++j) out[i][j] *= inverse;
      const std::int64_t row = y + kSide * i;
      if (args.logsumexp != nullptr && chunk == 0 && x == 0 && row < rows) {
        static_cast<T*>(args.logsumexp)[slice * shape.q_len + first_row + row] =
            row_logsumexp(block, maximum[i], T{1}, total);
      }
    }
    Tile::store(block, out, args.out, out_start, first_row, rows, first_out, shape.value_dim, T{1});
  }
};

}  // namespace torch_ext::cuda
