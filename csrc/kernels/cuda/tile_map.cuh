// Classifies the tiles of a boolean mask and of the key padding together, one warp a tile, so that
// kernels skip the empty ones and take the unmasked path through the full ones.
#pragma once

#include "device_attention.h"

namespace torch_ext::cuda {

struct TileMapArgs {
  DeviceShape shape;
  DeviceMasking masking;
};

struct TileMapProgram {
  using Args = TileMapArgs;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceMasking& masking = args.masking;
    const TileMap& map = masking.map;
    const std::int64_t entry = block.index() * (kThreads / kWarpSize) + block.thread() / kWarpSize;
    if (entry >= map.entries) return;
    std::int64_t rest = entry;
    const std::int64_t column_tile = rest % map.column_tiles;
    rest /= map.column_tiles;
    const std::int64_t row_tile = rest % map.row_tiles;
    rest /= map.row_tiles;
    const std::int64_t head = rest % map.heads;
    rest /= map.heads;
    std::int64_t mask_start = head * masking.mask.head_stride;
    std::int64_t padding_start = 0;
    for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
      const std::int64_t index = rest % map.batch_sizes[dim];
      rest /= map.batch_sizes[dim];
      mask_start += index * masking.mask.batch_strides[dim];
      padding_start += index * masking.padding.batch_strides[dim];
    }

    const auto* mask = static_cast<const std::uint8_t*>(masking.mask.data);
    const auto* padding = static_cast<const std::uint8_t*>(masking.padding.data);
    const bool boolean = masking.kind == AttentionMaskKind::kBoolean;
    const std::int64_t first_row = row_tile * kMapTile;
    const int rows =
        map.row_stride == 0
            ? 1
            : static_cast<int>(min_of<std::int64_t>(kMapTile, args.shape.q_len - first_row));
    bool some_attend = false;
    bool some_masked = false;
    for (int half = 0; half < kMapTile; half += kWarpSize) {
      const std::int64_t key = column_tile * kMapTile + half + block.thread() % kWarpSize;
      if (key >= args.shape.kv_len) continue;
      if (padding != nullptr && padding[padding_start + key * masking.padding.col_stride] != 0) {
        some_masked = true;
        continue;
      }
      if (!boolean) {
        some_attend = true;
        continue;
      }
      const std::uint8_t* column =
          mask + mask_start + first_row * masking.mask.row_stride + key * masking.mask.col_stride;
      for (int row = 0; row < rows; ++row) {
        const bool attends = column[row * masking.mask.row_stride] != 0;
        some_attend |= attends;
        some_masked |= !attends;
      }
    }
    some_attend = block.any(some_attend);
    some_masked = block.any(some_masked);
    if (block.thread() % kWarpSize == 0) {
      map.bits[entry] = static_cast<std::uint8_t>((some_attend ? kSomeAttend : 0) |
                                                  (some_masked ? kSomeMasked : 0));
    }
  }
};

}  // namespace torch_ext::cuda
