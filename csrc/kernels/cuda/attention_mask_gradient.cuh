// The gradient of an additive mask: dS, summed over whatever the mask broadcasts. A block has a
// tile of the mask's own elements and visits the score tiles that share it in a fixed order, so
// that each sum is made by one thread, always alike. Where that leaves the GPU idle, the visits are
// cut into partial sums, joined in their order.
#pragma once

#include "attention_scalar_backward.cuh"
#include "attention_score_gradients.cuh"

namespace torch_ext::cuda {

/// A tile of the mask's own shape, and one of the partial sums over those who share it.
struct MaskTile {
  std::int64_t batch[kMaxBatchDims];
  std::int64_t head;
  std::int64_t row_tile;
  std::int64_t column_tile;
  std::int64_t partial;
  std::int64_t own_batch;  // flat index over the mask's own batch sizes
};

TORCH_EXT_DEVICE MaskTile locate_mask_tile(const AttentionBackwardArgs& args, std::int64_t index) {
  MaskTile tile;
  tile.column_tile = index % args.mask_column_tiles;
  index /= args.mask_column_tiles;
  tile.row_tile = index % args.mask_row_tiles;
  index /= args.mask_row_tiles;
  tile.head = index % args.mask_heads;
  index /= args.mask_heads;
  std::int64_t batches = 1;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) batches *= args.mask_batch_sizes[dim];
  tile.own_batch = index % batches;
  tile.partial = index / batches;
  std::int64_t rest = tile.own_batch;
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    tile.batch[dim] = rest % args.mask_batch_sizes[dim];
    rest /= args.mask_batch_sizes[dim];
  }
  return tile;
}

/// The score tile of the `share`-th visit: what the mask broadcasts are the digits of `share`.
struct MaskShare {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t row_tile;
  std::int64_t column_tile;
};

TORCH_EXT_DEVICE MaskShare locate_mask_share(const AttentionBackwardArgs& args,
                                             const MaskTile& tile, std::int64_t share,
                                             std::int64_t row_tiles, std::int64_t column_tiles) {
  const DeviceShape& shape = args.shape;
  MaskShare result{0, tile.head, tile.row_tile, tile.column_tile};
  const auto digit = [&share](bool broadcast, std::int64_t size, std::int64_t own) {
    if (!broadcast) return own;
    const std::int64_t value = share % size;
    share /= size;
    return value;
  };
  result.column_tile = digit(args.grad_mask.col_stride == 0, column_tiles, tile.column_tile);
  result.row_tile = digit(args.grad_mask.row_stride == 0, row_tiles, tile.row_tile);
  result.head = digit(args.grad_mask.head_stride == 0, shape.query_heads, tile.head);
  std::int64_t place = 1;
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    result.batch += place * digit(args.grad_mask.batch_strides[dim] == 0, shape.batch_sizes[dim],
                                  tile.batch[dim]);
    place *= shape.batch_sizes[dim];
  }
  return result;
}

/// Sums a tile (rows, cols) of shared memory, rows `pitch` apart, over what the mask broadcasts and
/// writes it. Begins after a barrier.
template <typename T, int kThreads, typename Block>
TORCH_EXT_DEVICE void store_mask_tile(Block& block, const AttentionBackwardArgs& args,
                                      const MaskTile& tile, std::uint32_t offset, int pitch,
                                      int tile_rows, int tile_cols) {
  const bool one_row = args.grad_mask.row_stride == 0;
  const bool one_col = args.grad_mask.col_stride == 0;
  const auto value = [&](int row, int col) -> T& {
    return block.template shared<T>(offset +
                                    static_cast<std::uint32_t>((row * pitch + col) * sizeof(T)));
  };
  if (one_row) {
    for (int col = block.thread(); col < tile_cols; col += kThreads) {
      for (int row = 1; row < tile_rows; ++row) value(0, col) += value(row, col);
    }
    block.sync();
  }
  if (one_col) {
    for (int row = block.thread(); row < (one_row ? 1 : tile_rows); row += kThreads) {
      for (int col = 1; col < tile_cols; ++col) value(row, 0) += value(row, col);
    }
    block.sync();
  }
  const int rows = one_row ? 1 : tile_rows;
  const int cols = one_col ? 1 : tile_cols;
  std::int64_t start = tile.head * args.grad_mask.head_stride;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    start += tile.batch[dim] * args.grad_mask.batch_strides[dim];
  }
  std::int64_t batches = 1;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) batches *= args.mask_batch_sizes[dim];
  const std::int64_t slice =
      (tile.partial * batches + tile.own_batch) * args.mask_heads + tile.head;
  for (int place = block.thread(); place < rows * cols; place += kThreads) {
    const std::int64_t row = tile.row_tile * tile_rows + place / cols;
    const std::int64_t col = tile.column_tile * tile_cols + place % cols;
    if (row >= args.mask_rows || col >= args.mask_cols) continue;
    const T sum = value(place / cols, place % cols);
    if (args.mask_partial != nullptr) {
      static_cast<T*>(args.mask_partial)[(slice * args.mask_rows + row) * args.mask_cols + col] =
          sum;
    } else {
      static_cast<T*>(args.grad_mask.data)[start + row * args.grad_mask.row_stride +
                                           col * args.grad_mask.col_stride] = sum;
    }
  }
}

template <typename Element, int kDim>
struct AttentionMaskGradientProgram {
  using Args = AttentionBackwardArgs;
  using Tile = ScoreGradientTile<Element, kDim>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = Tile::kDimBytes <= 256 ? 2 : 1;
  static constexpr int kRows = Tile::kRows;
  static constexpr int kCols = Tile::kKeys;
  static constexpr int kPitch = kCols + 1;
  static_assert(kRows * kPitch * 4 <= kSharedBytes);

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const MaskTile own = locate_mask_tile(args, block.index());
    const std::int64_t row_tiles = (shape.q_len + kRows - 1) / kRows;
    const std::int64_t column_tiles = (shape.kv_len + kCols - 1) / kCols;
    typename Tile::Scores sum;
    clear<1, Tile::kScoreTiles>(sum);
    const std::int64_t last = (own.partial + 1) * args.shares / args.partials;
    TORCH_EXT_NO_UNROLL
    for (std::int64_t share = own.partial * args.shares / args.partials; share < last; ++share) {
      const MaskShare at = locate_mask_share(args, own, share, row_tiles, column_tiles);
      const RowTile tile = Tile::row_tile(args, at.batch, at.head, at.row_tile);
      const int first_key = static_cast<int>(at.column_tile * kCols);
      if (first_key >= tile.key_end) continue;
      const std::uint32_t bits = Tile::bits_of(args, tile, first_key);
      if (!(bits & kSomeAttend)) continue;
      block.sync();  // nobody reads the last tiles any more
      Tile::load_row_side(block, args, tile);
      Tile::load_key_side(block, args, tile, first_key);
      block.commit_copies();
      block.template wait_copies<0>();
      block.sync();
      typename Tile::Scores grads;
      Tile::compute(block, args, tile, bits, first_key, grads);
      TORCH_EXT_UNROLL
      for (int n = 0; n < Tile::kScoreTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) sum[0][n][e] += grads[0][n][e];
      }
    }
    block.sync();
    const int lane = block.thread() % kWarpSize;
    TORCH_EXT_UNROLL
    for (int n = 0; n < Tile::kScoreTiles; ++n) {
      TORCH_EXT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int row = block.thread() / kWarpSize * 16 + 8 * (e / 2) + lane / 4;
        const int col = 8 * n + lane % 4 * 2 + e % 2;
        block.template shared<float>(static_cast<std::uint32_t>((row * kPitch + col) * 4)) =
            sum[0][n][e];
      }
    }
    block.sync();
    store_mask_tile<float, kThreads>(block, args, own, 0, kPitch, kRows, kCols);
  }
};

template <typename Element, typename T>
struct AttentionScalarMaskGradientProgram {
  using Args = AttentionBackwardArgs;
  using Tile = ScalarTile<Element, T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr int kRows = Tile::kRows;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const MaskTile own = locate_mask_tile(args, block.index());
    const std::int64_t row_tiles = (shape.q_len + kRows - 1) / kRows;
    const std::int64_t column_tiles = (shape.kv_len + kRows - 1) / kRows;
    typename Tile::Scores sum;
    Tile::clear(sum);
    const std::int64_t last = (own.partial + 1) * args.shares / args.partials;
    for (std::int64_t share = own.partial * args.shares / args.partials; share < last; ++share) {
      const MaskShare at = locate_mask_share(args, own, share, row_tiles, column_tiles);
      const ScalarScores<Element, T> scores(args, at.batch, at.head);
      typename Tile::Scores weights;
      typename Tile::Scores grads;
      if (!scores.compute(block, at.row_tile * kRows, at.column_tile * kRows, weights, grads)) {
        continue;
      }
      TORCH_EXT_UNROLL
      for (int i = 0; i < Tile::kPerThread; ++i) {
        TORCH_EXT_UNROLL
        for (int j = 0; j < Tile::kPerThread; ++j) sum[i][j] += grads[i][j];
      }
    }
    Tile::keep(block, Tile::kWeights, sum);
    block.sync();
    store_mask_tile<T, kThreads>(block, args, own, Tile::kWeights, Tile::kPitch, kRows, kRows);
  }
};

/// Joins the partial sums in their order, one element a thread.
template <typename T>
struct AttentionMaskSumProgram {
  using Args = AttentionBackwardArgs;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    std::int64_t count = args.mask_heads * args.mask_rows * args.mask_cols;
    for (int dim = 0; dim < kMaxBatchDims; ++dim) count *= args.mask_batch_sizes[dim];
    const std::int64_t place = block.index() * kThreads + block.thread();
    if (place >= count) return;
    T sum = T{0};
    for (std::int64_t partial = 0; partial < args.partials; ++partial) {
      sum += static_cast<const T*>(args.mask_partial)[partial * count + place];
    }
    std::int64_t rest = place;
    const auto digit = [&rest](std::int64_t size, std::int64_t stride) {
      const std::int64_t offset = rest % size * stride;
      rest /= size;
      return offset;
    };
    std::int64_t offset = digit(args.mask_cols, args.grad_mask.col_stride);
    offset += digit(args.mask_rows, args.grad_mask.row_stride);
    offset += digit(args.mask_heads, args.grad_mask.head_stride);
    for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
      offset += digit(args.mask_batch_sizes[dim], args.grad_mask.batch_strides[dim]);
    }
    static_cast<T*>(args.grad_mask.data)[offset] = sum;
  }
};

}  // namespace torch_ext::cuda
