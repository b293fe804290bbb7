// Compile-time proof that fragments and swizzles are CuTe's.
#pragma once

#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/swizzle.hpp>

#include "tensor_core_fragments.h"
#include "tile_layout.cuh"

namespace torch_ext::cuda {

constexpr bool fragments_are_cutes() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int v = 0; v < 8; ++v) {
      const FragmentPlace left = left_place(lane, v);  // (m, k), m fastest
      if (typename Traits::ALayout{}(lane, v) != left.row + 16 * left.col) return false;
      if (v >= 4) continue;
      const FragmentPlace right = right_place(lane, v);  // (n, k), n fastest
      if (typename Traits::BLayout{}(lane, v) != right.col + 8 * right.row) return false;
      const FragmentPlace sum = accumulator_place(lane, v);  // (m, n), m fastest
      if (typename Traits::CLayout{}(lane, v) != sum.row + 16 * sum.col) return false;
    }
  }
  return true;
}
static_assert(fragments_are_cutes());

constexpr bool tf32_fragments_are_cutes() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x8_F32TF32TF32F32_TN>;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int v = 0; v < 4; ++v) {
      const FragmentPlace left = tf32_left_place(lane, v);
      if (typename Traits::ALayout{}(lane, v) != left.row + 16 * left.col) return false;
      const FragmentPlace sum = accumulator_place(lane, v);
      if (typename Traits::CLayout{}(lane, v) != sum.row + 16 * sum.col) return false;
      if (v >= 2) continue;
      const FragmentPlace right = tf32_right_place(lane, v);
      if (typename Traits::BLayout{}(lane, v) != right.col + 8 * right.row) return false;
    }
  }
  return true;
}
static_assert(tf32_fragments_are_cutes());

/// Elements of 16 bits: 8 to a chunk, 8 chunks to a period.
template <int kCols, int kShift>
constexpr bool swizzle_is_cutes() {
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < kCols / 8; ++chunk) {
      const int place = cute::Swizzle<3, 3, kShift>::apply(row * kCols + chunk * 8);
      if (static_cast<int>(swizzled<kCols>(row, chunk)) != place * 2) return false;
    }
  }
  return true;
}
static_assert(swizzle_is_cutes<64, 3>() && swizzle_is_cutes<128, 4>() &&
              swizzle_is_cutes<256, 5>());

}  // namespace torch_ext::cuda
