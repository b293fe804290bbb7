// Tiles of 16-bit elements in shared memory, and their products on m16n8k16 tensor cores.
//
// A tile of (rows, kCols) is stored by rows in chunks of 16 bytes, chunk c of row r at place
// c ^ (r % 8): CuTe's Swizzle<3, 3, .>. The eight rows that one phase of ldmatrix reads, and the
// eight chunks that cp.async writes, then lie in different banks.
//
// Fragments of lane i, with g = i / 4 and t = i % 4:
//   C, D (16, 8):   [0], [1]: row g, columns 2t, 2t + 1;  [2], [3]: row g + 8
//   A    (16, 16):  [0]: row g, columns 2t, 2t + 1;  [1]: row g + 8;  [2], [3]: columns + 8
//   B    (16, 8):   [0]: rows 2t, 2t + 1 of column g;  [1]: rows + 8
// so that two accumulators, side by side, are the A of a next product.
#pragma once

#include <cstdint>

#include "../counter_rng.h"
#include "device_program.h"

namespace torch_ext::cuda {

/// Byte offset of chunk `chunk` of row `row`.
template <int kCols>
TORCH_EXT_HOST_DEVICE constexpr std::uint32_t swizzled(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kCols * 2 + ((chunk ^ (row & 7)) << 4));
}

/// Reads 16 x 16 blocks of a tile. kHalves: what lane bits 3 and 4 stand for.
enum class BlockOrder {
  kRowsFirst,    // bit 3: rows + 8, bit 4: columns + 8
  kColumnsFirst  // bit 3: columns + 8, bit 4: rows + 8
};

template <int kCols, BlockOrder kOrder>
class TileReader {
 public:
  /// `tile` is a multiple of kCols * 2, first_row of 8.
  TORCH_EXT_DEVICE TileReader(std::uint32_t tile, int first_row, int lane) {
    const int low = lane >> 3 & 1;
    const int high = lane >> 4 & 1;
    const int row = (lane & 7) + 8 * (kOrder == BlockOrder::kRowsFirst ? low : high);
    const int half = kOrder == BlockOrder::kRowsFirst ? high : low;
    place_ = tile + swizzled<kCols>(first_row + row, half);
  }

  /// This lane's row of the block `rows` (a multiple of 8) below the first, at chunks
  /// [chunk, chunk + 2), chunk even. Chunks only change bits that the row leaves alone.
  TORCH_EXT_DEVICE std::uint32_t operator()(int rows, int chunk) const {
    return (place_ ^ static_cast<std::uint32_t>(chunk << 4)) +
           static_cast<std::uint32_t>(rows * kCols * 2);
  }

 private:
  std::uint32_t place_;
};

template <int kMTiles, int kNTiles>
using Accumulators = float[kMTiles][kNTiles][4];

template <int kMTiles, int kNTiles>
TORCH_EXT_DEVICE void clear(Accumulators<kMTiles, kNTiles>& acc) {
  TORCH_EXT_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      TORCH_EXT_UNROLL
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
    }
  }
}

/// acc (16 kMTiles, 8 kNTiles) += a b^T, both (., kCols) by rows.
template <typename Element, int kCols, int kMTiles, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_rows(Block& block, Accumulators<kMTiles, kNTiles>& acc,
                                    std::uint32_t a, int a_row, std::uint32_t b, int b_row) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  const TileReader<kCols, BlockOrder::kRowsFirst> read_a(a, a_row, lane);
  const TileReader<kCols, BlockOrder::kColumnsFirst> read_b(b, b_row, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kCols / 16; ++k) {
    std::uint32_t left[kMTiles][4];
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) block.load_matrices(left[m], read_a(16 * m, 2 * k));
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      std::uint32_t right[4];
      block.load_matrices(right, read_b(8 * n, 2 * k));
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        block.template multiply<Element>(acc[m][n], left[m], right[0], right[1]);
        block.template multiply<Element>(acc[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// Columns [16 k, 16 k + 16) of accumulators, rounded, as the left operand of a product.
template <typename Element, int kNTiles, typename Block>
TORCH_EXT_DEVICE void pack_left(Block& block, const float (&acc)[kNTiles][4], int k,
                                std::uint32_t (&left)[4]) {
  left[0] = block.pack(Element{}, acc[2 * k][0], acc[2 * k][1]);
  left[1] = block.pack(Element{}, acc[2 * k][2], acc[2 * k][3]);
  left[2] = block.pack(Element{}, acc[2 * k + 1][0], acc[2 * k + 1][1]);
  left[3] = block.pack(Element{}, acc[2 * k + 1][2], acc[2 * k + 1][3]);
}

/// acc (16 kMTiles, 8 kNTiles) += weights (16 kMTiles, 8 kDepthTiles) b[:, first_col:], with b
/// (., kCols) by rows, its rows from b_row on.
template <typename Element, int kCols, int kMTiles, int kDepthTiles, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_weights(Block& block, Accumulators<kMTiles, kNTiles>& acc,
                                       const Accumulators<kMTiles, kDepthTiles>& weights,
                                       std::uint32_t b, int b_row, int first_col) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  const TileReader<kCols, BlockOrder::kRowsFirst> read_b(b, b_row, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kDepthTiles / 2; ++k) {
    std::uint32_t left[kMTiles][4];
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) pack_left<Element>(block, weights[m], k, left[m]);
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      std::uint32_t right[4];
      block.load_matrices_transposed(right, read_b(16 * k, first_col / 8 + n));
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        block.template multiply<Element>(acc[m][n], left[m], right[0], right[1]);
        block.template multiply<Element>(acc[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// acc (16, 8 kNTiles) += a^T[a_col:] b[:, first_col:], a (kDepth, kACols) and b (kDepth, kCols) by
/// rows.
template <typename Element, int kDepth, int kACols, int kCols, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_columns(Block& block, float (&acc)[kNTiles][4], std::uint32_t a,
                                       int a_col, std::uint32_t b, int first_col) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  const TileReader<kACols, BlockOrder::kColumnsFirst> read_a(a, 0, lane);
  const TileReader<kCols, BlockOrder::kRowsFirst> read_b(b, 0, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kDepth / 16; ++k) {
    std::uint32_t left[4];
    block.load_matrices_transposed(left, read_a(16 * k, a_col / 8));
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      std::uint32_t right[4];
      block.load_matrices_transposed(right, read_b(16 * k, first_col / 8 + n));
      block.template multiply<Element>(acc[n], left, right[0], right[1]);
      block.template multiply<Element>(acc[n + 1], left, right[2], right[3]);
    }
  }
}

/// Fills a tile (kRows, kCols) from rows of global memory, `row_stride` elements apart, zeros
/// beyond `rows` and `cols`. Done at the next wait for copies and barrier.
template <int kRows, int kCols, int kThreads, typename Block>
TORCH_EXT_DEVICE void copy_tile(Block& block, std::uint32_t tile, const std::uint16_t* data,
                                std::int64_t row_stride, int rows, int cols) {
  constexpr int kChunks = kCols / 8;
  constexpr int kPassRows = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kPassRows == 0);
  const int thread = block.anew(block.thread());
  const int row = thread / kChunks;
  const int chunk = thread % kChunks;
  // A running pointer: one address for each pass would fill the registers.
  const std::uint16_t* source = data + row * row_stride + chunk * 8;
  std::uint32_t target = tile + swizzled<kCols>(row, chunk);
  static_assert(kPassRows % 8 == 0 || 8 % kPassRows == 0);
  TORCH_EXT_UNROLL
  for (int pass = 0; pass < kRows / kPassRows; ++pass) {
    const int here = row + pass * kPassRows;
    const bool valid = here < rows && chunk * 8 < cols;
    if constexpr (kPassRows % 8 != 0) target = tile + swizzled<kCols>(here, chunk);
    block.copy_async(target, valid ? source : data, valid);
    source += kPassRows * row_stride;
    if constexpr (kPassRows % 8 == 0) target += kPassRows * kCols * 2;
  }
}

/// copy_tile() for rows anywhere. offset_of(row): its element offset.
template <int kRows, int kCols, int kThreads, typename Block, typename OffsetOf>
TORCH_EXT_DEVICE void copy_rows(Block& block, std::uint32_t tile, const std::uint16_t* data,
                                int rows, int cols, OffsetOf offset_of) {
  constexpr int kChunks = kCols / 8;
  TORCH_EXT_NO_UNROLL
  for (int place = block.thread(); place < kRows * kChunks; place += kThreads) {
    const int row = place / kChunks;
    const int chunk = place % kChunks;
    const bool valid = row < rows && chunk * 8 < cols;
    block.copy_async(tile + swizzled<kCols>(row, chunk),
                     data + (valid ? offset_of(row) + chunk * 8 : 0), valid);
  }
}

/// copy_rows() for rows of any alignment and width: one element at a time.
template <int kRows, int kCols, int kThreads, typename Block, typename OffsetOf>
TORCH_EXT_DEVICE void gather_rows(Block& block, std::uint32_t tile, const std::uint16_t* base,
                                  int rows, int cols, OffsetOf offset_of) {
  TORCH_EXT_NO_UNROLL
  for (int place = block.thread(); place < kRows * kCols / 2; place += kThreads) {
    const int row = place / (kCols / 2);
    const int col = place % (kCols / 2) * 2;
    std::uint32_t pair = 0;
    if (row < rows && col < cols) {
      const std::int64_t offset = offset_of(row) + col;
      pair = base[offset];
      if (col + 1 < cols) pair |= static_cast<std::uint32_t>(base[offset + 1]) << 16;
    }
    block.template shared<std::uint32_t>(tile + swizzled<kCols>(row, col / 8) +
                                         static_cast<std::uint32_t>(col % 8 * 2)) = pair;
  }
}

/// A tile of consecutive rows from `start` on, `view`'s strides. Where !kGeneral, the caller has
/// made sure of whole chunks.
template <int kRows, int kCols, int kThreads, bool kGeneral, typename Block, typename View>
TORCH_EXT_DEVICE void load_tile(Block& block, std::uint32_t tile, const View& view,
                                std::int64_t start, int rows, int cols) {
  const auto* data = static_cast<const std::uint16_t*>(view.data) + start;
  if constexpr (kGeneral) {
    if (!view.copies_whole_chunks) {
      gather_rows<kRows, kCols, kThreads>(block, tile, data, rows, cols,
                                          [&](int row) { return row * view.row_stride; });
      return;
    }
  }
  copy_tile<kRows, kCols, kThreads>(block, tile, data, view.row_stride, rows, cols);
}

/// A tile of rows anywhere.
template <int kRows, int kCols, int kThreads, bool kGeneral, typename Block, typename View,
          typename OffsetOf>
TORCH_EXT_DEVICE void load_rows(Block& block, std::uint32_t tile, const View& view,
                                std::int64_t start, int rows, int cols, OffsetOf offset_of) {
  const auto* data = static_cast<const std::uint16_t*>(view.data) + start;
  if constexpr (kGeneral) {
    if (!view.copies_whole_chunks) {
      gather_rows<kRows, kCols, kThreads>(block, tile, data, rows, cols, offset_of);
      return;
    }
  }
  copy_rows<kRows, kCols, kThreads>(block, tile, data, rows, cols, offset_of);
}

/// Two neighbouring elements of a row of the output.
template <typename Element, typename Block, typename View>
TORCH_EXT_DEVICE void store_pair(Block& block, const View& view, std::int64_t row_offset, int col,
                                 int cols, float low, float high) {
  auto* base = static_cast<std::uint16_t*>(view.data);
  const std::uint32_t pair = block.pack(Element{}, low, high);
  if (view.copies_whole_chunks) {
    if (col < cols) *reinterpret_cast<std::uint32_t*>(base + row_offset + col) = pair;
    return;
  }
  if (col < cols) base[row_offset + col * view.col_stride] = static_cast<std::uint16_t>(pair);
  if (col + 1 < cols) {
    base[row_offset + (col + 1) * view.col_stride] = static_cast<std::uint16_t>(pair >> 16);
  }
}

/// ... of a row of a gradient, which is float where args.unrounded_grads.
template <typename Element, typename Block, typename Args, typename View>
TORCH_EXT_DEVICE void store_gradient_pair(Block& block, const Args& args, const View& view,
                                          std::int64_t row_offset, int col, int cols, float low,
                                          float high) {
  if (args.unrounded_grads) {
    auto* base = static_cast<float*>(view.data) + row_offset;
    if (col < cols) base[col * view.col_stride] = low;
    if (col + 1 < cols) base[(col + 1) * view.col_stride] = high;
    return;
  }
  store_pair<Element>(block, view, row_offset, col, cols, low, high);
}

}  // namespace torch_ext::cuda
