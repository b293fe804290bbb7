// A list of tensors as one launch's parameters: entries, in front, and the strides of those that
// need them, at the back. Blocks find the entry that their chunk belongs to by bisection, so that a
// launch has as many chunks as its tensors have, and copies no tables to the device.
#pragma once

#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"

namespace torch_ext::cuda {

/// Elements of a chunk of an entry without strides: what a block works on, so that 100 M elements
/// are 6000 blocks, six times as many as fit the largest GPU at once. Part of what a norm is: its
/// sums are per chunk.
inline constexpr int kChunkElements = 16384;

/// A chunk of an entry with strides: a tile of its two innermost dimensions, with at most 2^7
/// columns and as many rows as make this many places.
inline constexpr int kTilePlaces = 4096;
inline constexpr int kMaxTileColumnsLog2 = 7;

/// Kernel parameters end at 4 KB; at 32764 bytes from CUDA 12.1 on. The smaller list is the quicker
/// launch.
inline constexpr int kSmallListBytes = 3840;
inline constexpr int kLargeListBytes = 32256;

template <int kOperands>
struct ListEntry {
  static_assert(kOperands <= 6);
  void* data[kOperands];
  std::int64_t count;
  std::uint32_t first_chunk;
  std::uint32_t types : 18;  // three bits an operand
  std::uint32_t loop : 13;   // 0: none; else its StridedLoop begins so many numbers before the end
  std::uint32_t flag : 1;

  constexpr ScalarType type(int operand) const {
    return static_cast<ScalarType>(types >> 3 * operand & 7);
  }
};

template <int kOperandCount, int kBytes>
struct TensorList {
  static constexpr int kOperands = kOperandCount;
  using Entry = ListEntry<kOperands>;
  static constexpr int kNumbers = kBytes / 8;
  static_assert(sizeof(Entry) % 8 == 0 && kNumbers < 1 << 13);

  std::int64_t first_entry;  // of the caller's list
  std::int64_t first_chunk;  // likewise
  std::int32_t num_entries;
  std::uint32_t num_chunks;
  union {
    std::int64_t numbers[kNumbers];
    Entry entries[kBytes / sizeof(Entry)];
  };
};

/// The loop of an entry: dims and columns in one number, then sizes and strides as in StridedLoop.
struct LoopView {
  std::int32_t dims;
  std::int32_t tile_columns_log2;
  const std::int64_t* sizes;
  const std::int64_t* strides;
};

template <typename List>
TORCH_EXT_DEVICE LoopView loop_view(const List& list, const typename List::Entry& entry) {
  const std::int64_t* record = list.numbers + (List::kNumbers - static_cast<int>(entry.loop));
  const auto dims = static_cast<std::int32_t>(record[0] & 0xFFFF);
  return {dims, static_cast<std::int32_t>(record[0] >> 16), record + 1, record + 1 + dims};
}

/// The last entry whose first chunk is not behind `chunk`: the one that has it.
template <typename List>
TORCH_EXT_DEVICE int entry_of_chunk(const List& list, std::uint32_t chunk) {
  int low = 0;
  int high = list.num_entries;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// A tile of an entry with strides: where it begins and what of it there is.
struct ListTile {
  std::int64_t outer;  // flattened index of the dimensions but the last two
  std::int64_t row;
  std::int64_t col;
  std::int64_t rows;
  std::int64_t cols;
};

TORCH_EXT_DEVICE ListTile list_tile(const LoopView& loop, std::int64_t chunk) {
  const std::int64_t rows = loop.dims >= 2 ? loop.sizes[loop.dims - 2] : 1;
  const std::int64_t cols = loop.sizes[loop.dims - 1];
  const std::int64_t tile_cols = std::int64_t{1} << loop.tile_columns_log2;
  const std::int64_t tile_rows = kTilePlaces / tile_cols;
  const std::int64_t col_tiles = ceil_div(cols, tile_cols);
  const std::int64_t row_tiles = ceil_div(rows, tile_rows);
  ListTile tile{};
  tile.col = chunk % col_tiles * tile_cols;
  tile.row = chunk / col_tiles % row_tiles * tile_rows;
  tile.outer = chunk / col_tiles / row_tiles;
  tile.cols = min_of(tile_cols, cols - tile.col);
  tile.rows = min_of(tile_rows, rows - tile.row);
  return tile;
}

/// Offset of the tile's first element in an operand, and its two strides.
struct TilePlace {
  std::int64_t offset;
  std::int64_t row_stride;
  std::int64_t col_stride;
};

TORCH_EXT_DEVICE TilePlace tile_place(const LoopView& loop, const ListTile& tile, int operand) {
  const std::int64_t* strides = loop.strides + operand * loop.dims;
  TilePlace place{};
  place.col_stride = strides[loop.dims - 1];
  place.offset = tile.col * place.col_stride;
  if (loop.dims < 2) return place;
  place.row_stride = strides[loop.dims - 2];
  place.offset += tile.row * place.row_stride;
  std::int64_t outer = tile.outer;
  for (int dim = loop.dims - 3; dim >= 0; --dim) {
    place.offset += outer % loop.sizes[dim] * strides[dim];
    outer /= loop.sizes[dim];
  }
  return place;
}

/// Offset of an element of a tile from the tile's first.
TORCH_EXT_DEVICE std::int64_t element_place(const LoopView& loop, int operand, std::int64_t row,
                                            std::int64_t col) {
  const std::int64_t* strides = loop.strides + (operand + 1) * loop.dims;
  return col * strides[-1] + (loop.dims < 2 ? 0 : row * strides[-2]);
}

}  // namespace torch_ext::cuda
