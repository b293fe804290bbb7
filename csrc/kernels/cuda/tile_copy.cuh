// Tiles between global and shared memory, and accumulators to rows of global memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tensor_core_tile.cuh"

namespace torch_ext::cuda {

/// Fills a tile (kRows, kCols) of 16 bits from rows of global memory, `row_stride` apart, zeros
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

/// copy_rows() for rows of any alignment and width, of Element: 32 bits at a time.
template <typename Element, int kRows, int kCols, int kThreads, typename Block, typename OffsetOf>
TORCH_EXT_DEVICE void gather_rows(Block& block, std::uint32_t tile, const void* base, int rows,
                                  int cols, OffsetOf offset_of) {
  constexpr int kPerWord = 4 / kElementBytes<Element>;
  constexpr int kWords = kCols / kPerWord;  // of a row
  TORCH_EXT_NO_UNROLL
  for (int place = block.thread(); place < kRows * kWords; place += kThreads) {
    const int row = place / kWords;
    const int col = place % kWords * kPerWord;
    std::uint32_t word = 0;
    if (row < rows && col < cols) {
      const std::int64_t offset = offset_of(row) + col;
      if constexpr (kPerWord == 1) {
        word = static_cast<const std::uint32_t*>(base)[offset];
      } else {
        const auto* halves = static_cast<const std::uint16_t*>(base);
        word = halves[offset];
        if (col + 1 < cols) word |= static_cast<std::uint32_t>(halves[offset + 1]) << 16;
      }
    }
    block.template shared<std::uint32_t>(tile + element_place<Element, kCols>(row, col)) = word;
  }
}

/// A tile (kRows, kCols) of Element of rows anywhere from `start` on. offset_of(row): their element
/// offsets. Where !kGeneral, the caller has made sure of whole chunks.
template <typename Element, int kRows, int kCols, int kThreads, bool kGeneral, typename Block,
          typename View, typename OffsetOf>
TORCH_EXT_DEVICE void load_rows(Block& block, std::uint32_t tile, const View& view,
                                std::int64_t start, int rows, int cols, OffsetOf offset_of) {
  constexpr int kHalves = kElementBytes<Element> / 2;
  const auto* data = static_cast<const std::uint16_t*>(view.data) + start * kHalves;
  if constexpr (kGeneral) {
    if (!view.copies_whole_chunks) {
      gather_rows<Element, kRows, kCols, kThreads>(block, tile, data, rows, cols, offset_of);
      return;
    }
  }
  copy_rows<kRows, kCols * kHalves, kThreads>(block, tile, data, rows, cols * kHalves,
                                              [&](int row) { return offset_of(row) * kHalves; });
}

/// ... of consecutive rows, the view's stride apart.
template <typename Element, int kRows, int kCols, int kThreads, bool kGeneral, typename Block,
          typename View>
TORCH_EXT_DEVICE void load_tile(Block& block, std::uint32_t tile, const View& view,
                                std::int64_t start, int rows, int cols) {
  constexpr int kHalves = kElementBytes<Element> / 2;
  const auto* data = static_cast<const std::uint16_t*>(view.data) + start * kHalves;
  if constexpr (kGeneral) {
    if (!view.copies_whole_chunks) {
      gather_rows<Element, kRows, kCols, kThreads>(block, tile, data, rows, cols,
                                                   [&](int row) { return row * view.row_stride; });
      return;
    }
  }
  copy_tile<kRows, kCols * kHalves, kThreads>(block, tile, data, view.row_stride * kHalves, rows,
                                              cols * kHalves);
}

template <typename View>
TORCH_EXT_DEVICE void store_float_pair(const View& view, std::int64_t row_offset, int col, int cols,
                                       float low, float high) {
  auto* base = static_cast<float*>(view.data) + row_offset;
  if (col < cols) base[col * view.col_stride] = low;
  if (col + 1 < cols) base[(col + 1) * view.col_stride] = high;
}

/// Two neighbouring elements of a row of the output.
template <typename Element, typename Block, typename View>
TORCH_EXT_DEVICE void store_pair(Block& block, const View& view, std::int64_t row_offset, int col,
                                 int cols, float low, float high) {
  if constexpr (std::is_same_v<Element, Tf32>) {
    store_float_pair(view, row_offset, col, cols, low, high);
  } else {
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
}

/// ... of a row of a gradient, which is float where args.unrounded_grads.
template <typename Element, typename Block, typename Args, typename View>
TORCH_EXT_DEVICE void store_gradient_pair(Block& block, const Args& args, const View& view,
                                          std::int64_t row_offset, int col, int cols, float low,
                                          float high) {
  if (args.unrounded_grads) {
    store_float_pair(view, row_offset, col, cols, low, high);
    return;
  }
  store_pair<Element>(block, view, row_offset, col, cols, low, high);
}

}  // namespace torch_ext::cuda
