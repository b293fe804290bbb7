// The sum of dQ that the blocks of the keys' pass add to: float, in the order of their
// accumulators.
#pragma once

#include "device_attention.h"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

/// Element e of lane `lane` in a (16, 8) piece of the sum of dQ: whole sectors for each
/// instruction.
template <bool kWide>
TORCH_EXT_HOST_DEVICE constexpr int sum_place(int lane, int e) {
  return kWide ? lane * 4 + e : e * kWarpSize + lane;
}

/// Brings the sum of dQ into its dtype and place: 16 queries a block.
template <typename Element>
struct AttentionGradQuerySumProgram {
  using Args = AttentionBackwardArgs;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const std::int64_t tiles = args.padded_rows / 16;
    const std::int64_t slice = block.index() / tiles;
    const std::int64_t first_query = block.index() % tiles * 16;
    // The columns that the tiles were padded to.
    const std::int64_t pieces = args.dim_chunks;
    const float* sum = args.grad_query_sum + block.index() * pieces * 128;
    const std::int64_t start =
        slice_start(args.grad_query, shape, slice / shape.query_heads, slice % shape.query_heads);
    const float factor = static_cast<float>(args.scale);
    for (int place = block.thread(); place < pieces * kWarpSize; place += kThreads) {
      const int piece = place / kWarpSize;
      const int lane = place % kWarpSize;
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const std::int64_t query = first_query + 8 * half + lane / 4;
        if (query >= shape.q_len) continue;
        constexpr bool kWide = Block::kWideAtomics;
        store_gradient_pair<Element>(
            block, args, args.grad_query, start + query * args.grad_query.row_stride,
            8 * piece + lane % 4 * 2, static_cast<int>(shape.head_dim),
            sum[piece * 128 + sum_place<kWide>(lane, 2 * half)] * factor,
            sum[piece * 128 + sum_place<kWide>(lane, 2 * half + 1)] * factor);
      }
    }
  }
};

}  // namespace torch_ext::cuda
