// Products of floats as TF32, where the depth runs over the rows of a tile: ldmatrix transposes
// 16-bit elements alone, so that fragments are read element by element, without bank conflicts.
#pragma once

#include <cstdint>

#include "tile_layout.cuh"

namespace torch_ext::cuda {

TORCH_EXT_DEVICE std::uint32_t float_bits(float value) {
  return __builtin_bit_cast(std::uint32_t, value);
}

/// multiply_weights() of tensor_core_tile.cuh.
template <int kCols, int kMTiles, int kDepthTiles, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_tf32_weights(Block& block, Accumulators<kMTiles, kNTiles>& acc,
                                            const Accumulators<kMTiles, kDepthTiles>& weights,
                                            std::uint32_t b, int b_row, int first_col) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  const DepthReader<kCols> read_b(b, b_row, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kDepthTiles; ++k) {
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      std::uint32_t right[2];
      read_b(block, 8 * k, first_col + 8 * n, right[0], right[1]);
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        const float(&weight)[4] = weights[m][k];
        const std::uint32_t left[4] = {float_bits(weight[0]), float_bits(weight[2]),
                                       float_bits(weight[1]), float_bits(weight[3])};
        block.template multiply<Tf32>(acc[m][n], left, right[0], right[1]);
      }
    }
  }
}

/// multiply_columns() of tensor_core_tile.cuh.
template <int kDepth, int kACols, int kCols, int kNTiles, typename Block>
TORCH_EXT_DEVICE void multiply_tf32_columns(Block& block, float (&acc)[kNTiles][4], std::uint32_t a,
                                            int a_col, std::uint32_t b, int first_col) {
  const int lane = block.anew(block.thread() % kWarpSize);  // few registers for addresses
  const DepthReader<kACols> read_a(a, 0, lane);
  const DepthReader<kCols> read_b(b, 0, lane);
  TORCH_EXT_UNROLL
  for (int k = 0; k < kDepth / 8; ++k) {
    std::uint32_t left[4];
    read_a(block, 8 * k, a_col, left[0], left[2]);
    read_a(block, 8 * k, a_col + 8, left[1], left[3]);
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      std::uint32_t right[2];
      read_b(block, 8 * k, first_col + 8 * n, right[0], right[1]);
      block.template multiply<Tf32>(acc[n], left, right[0], right[1]);
    }
  }
}

}  // namespace torch_ext::cuda
