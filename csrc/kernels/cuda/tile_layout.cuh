// Tiles in shared memory, and how the fragments of tensor core products are read from them:
// m16n8k16 of 16-bit elements, m16n8k8 of floats as TF32.
//
// A tile of (rows, kCols) is stored by rows in chunks of 16 bytes, chunk c of row r at place
// c ^ (r % 8): CuTe's Swizzle<3, 3, .>. The eight rows that one phase of ldmatrix reads, and the
// eight chunks that cp.async writes, then lie in different banks.
//
// Fragments of lane i, with g = i / 4 and t = i % 4:
//   C, D (16, 8):   [0], [1]: row g, columns 2t, 2t + 1;  [2], [3]: row g + 8
//   A    (16, 16):  [0]: row g, columns 2t, 2t + 1;  [1]: row g + 8;  [2], [3]: columns + 8
//   B    (16, 8):   [0]: rows 2t, 2t + 1 of column g;  [1]: rows + 8
// so that two accumulators, side by side, are the A of a next product. Of TF32:
//   A    (16, 8):   [0]: row g, column t;  [1]: row g + 8;  [2], [3]: columns + 4
//   B    (8, 8):    [0]: row t of column g;  [1]: row t + 4
// The same bytes in the same lanes, where both operands lie by rows of the depth (ldmatrix). One
// accumulator is the A of a next product where the depth is counted 0, 2, 4, 6, 1, 3, 5, 7.
#pragma once

#include <cstdint>

#include "../counter_rng.h"
#include "device_program.h"

namespace torch_ext::cuda {

/// Columns of 16 bits that a row of kCols elements takes: what tiles are addressed by.
template <typename Element, int kCols>
inline constexpr int kHalfCols = kCols* kElementBytes<Element> / 2;

/// Byte offset of chunk `chunk` of row `row`, of kCols columns of 16 bits.
template <int kCols>
TORCH_EXT_HOST_DEVICE constexpr std::uint32_t swizzled(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kCols * 2 + ((chunk ^ (row & 7)) << 4));
}

/// Byte offset of an element, where no two of its chunk's are apart.
template <typename Element, int kCols>
TORCH_EXT_HOST_DEVICE constexpr std::uint32_t element_place(int row, int col) {
  constexpr int kBytes = kElementBytes<Element>;
  return swizzled<kHalfCols<Element, kCols>>(row, col * kBytes / kCopyBytes) +
         static_cast<std::uint32_t>(col * kBytes % kCopyBytes);
}

/// Reads 16 rows x 32 bytes of a tile. kHalves: what lane bits 3 and 4 stand for.
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

/// Reads floats of a tile (., kCols) for products over its rows: rows 2t and 2t + 1, column g.
template <int kCols>
class DepthReader {
 public:
  /// `tile` is a multiple of kCols * 4, first_row of 8.
  TORCH_EXT_DEVICE DepthReader(std::uint32_t tile, int first_row, int lane)
      : place_(tile + element_place<Tf32, kCols>(first_row + lane % 4 * 2, lane / 4)) {}

  /// `rows` (a multiple of 8) below the first, of columns [col, col + 8), col a multiple of 8. The
  /// next row's chunks are swapped in pairs.
  template <typename Block>
  TORCH_EXT_DEVICE void operator()(Block& block, int rows, int col, std::uint32_t& even,
                                   std::uint32_t& odd) const {
    const std::uint32_t place = place_ ^ static_cast<std::uint32_t>(col * 4);
    const std::uint32_t below = static_cast<std::uint32_t>(rows * kCols * 4);
    even = block.template shared<std::uint32_t>(place + below);
    odd = block.template shared<std::uint32_t>((place ^ kCopyBytes) + below + kCols * 4);
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

}  // namespace torch_ext::cuda
