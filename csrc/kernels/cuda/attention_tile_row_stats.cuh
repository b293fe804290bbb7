// What the tensor core tiles need of each row: attention_row_stats.cuh, delta on tensor cores.
#pragma once

#include "attention_row_stats.cuh"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

/// delta is the diagonal of out grad_out^T: tensor cores add its products up as they do those of
/// dP. Where one key takes it all the two are the same bits, and cancel.
template <typename Element>
struct AttentionTileRowStatsProgram {
  using Args = AttentionBackwardArgs;
  using Stored = std::conditional_t<std::is_same_v<Element, Tf32>, float, Element>;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / kWarpSize * 16;
  static constexpr int kCols = 64;  // at a time
  static constexpr std::uint32_t kGradOutTile = kRows * kCols * kElementBytes<Element>;
  static constexpr int kSharedBytes = static_cast<int>(2 * kGradOutTile);
  static constexpr int kBlocksPerUnit = 2;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const std::int64_t tiles = args.padded_rows / kRows;
    const std::int64_t slice = block.index() / tiles;
    const std::int64_t first_row = block.index() % tiles * kRows;
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const int rows = static_cast<int>(min_of<std::int64_t>(kRows, shape.q_len - first_row));
    const int warp_row = block.thread() / kWarpSize * 16;
    Accumulators<1, 2> products;
    clear<1, 2>(products);
    TORCH_EXT_NO_UNROLL
    for (int first = 0; first < static_cast<int>(shape.value_dim); first += kCols) {
      const auto load = [&](std::uint32_t target, const DeviceView& view) {
        load_tile<Element, kRows, kCols, kThreads, true>(
            block, target, view,
            slice_start(view, shape, batch, head) + first_row * view.row_stride + first, rows,
            min_of(kCols, static_cast<int>(shape.value_dim) - first));
      };
      block.sync();  // nobody reads the last columns any more
      load(0, args.out);
      load(kGradOutTile, args.grad_out);
      block.commit_copies();
      block.template wait_copies<0>();
      block.sync();
      multiply_rows<Element, kCols, 1, 2>(block, products, 0, warp_row, kGradOutTile, warp_row);
    }
    // Row r's product with itself: lane 4 (r % 8) + r % 8 / 2 has it.
    const int lane = block.thread() % kWarpSize;
    const bool odd = lane / 4 % 2 != 0;
    const float low = odd ? products[0][0][1] : products[0][0][0];
    const float high = odd ? products[0][1][3] : products[0][1][2];
    TORCH_EXT_NO_UNROLL
    for (int row = 0; row < 16; ++row) {
      const float delta = block.shuffle(row < 8 ? low : high, row % 8 * 4 + row % 8 / 2);
      store_backward_stats<Stored>(block, args, slice, first_row + warp_row + row, delta);
    }
  }
};

}  // namespace torch_ext::cuda
