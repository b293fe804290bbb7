// Products of tiles in shared memory on tensor cores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tf32_products.cuh"
#include "tile_layout.cuh"

namespace torch_ext::cuda {

/// acc (16 kMTiles, 8 kNTiles) += a b^T, both (., kCols) by rows.
template <typename Element, int kCols, int kMTiles, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_rows(Block& block, Accumulators<kMTiles, kNTiles>& acc,
                                    std::uint32_t a, int a_row, std::uint32_t b, int b_row) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  constexpr int kHalves = kHalfCols<Element, kCols>;
  const TileReader<kHalves, BlockOrder::kRowsFirst> read_a(a, a_row, lane);
  const TileReader<kHalves, BlockOrder::kColumnsFirst> read_b(b, b_row, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kHalves / 16; ++k) {
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
  if constexpr (std::is_same_v<Element, Tf32>) {
    multiply_tf32_weights<kCols>(block, acc, weights, b, b_row, first_col);
  } else {
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
}

/// acc (16, 8 kNTiles) += a^T[a_col:] b[:, first_col:], a (kDepth, kACols) and b (kDepth, kCols) by
/// rows.
template <typename Element, int kDepth, int kACols, int kCols, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_columns(Block& block, float (&acc)[kNTiles][4], std::uint32_t a,
                                       int a_col, std::uint32_t b, int first_col) {
  if constexpr (std::is_same_v<Element, Tf32>) {
    multiply_tf32_columns<kDepth, kACols, kCols>(block, acc, a, a_col, b, first_col);
  } else {
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
}

}  // namespace torch_ext::cuda
