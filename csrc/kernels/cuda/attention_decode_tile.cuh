// Decoding: at most 16 rows, the grouped heads of few queries, against many keys. The time is that
// of reading keys and values, so each of four warps takes 16 of every 64 keys with a softmax of its
// own, and the four are joined at the end.
#pragma once

#include "attention_row_tile.cuh"
#include "attention_score_tile.cuh"
#include "element_store.cuh"
#include "tile_copy.cuh"

namespace torch_ext::cuda {

template <typename Element_, int kDim_>
struct AttentionDecodeProgram {
  using Args = AttentionForwardArgs;
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16;
  static constexpr int kKeys = kMapTile;
  static constexpr int kWarpKeys = kKeys / kWarps;
  static constexpr int kScoreTiles = kWarpKeys / 8;
  static constexpr int kOutTiles = kDim / 8;
  static constexpr int kRowBytes = kDim * kElementBytes<Element>;
  static constexpr int kStages = kRowBytes <= 256 ? 2 : 1;  // tiles under way
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr int kBlocksPerUnit = 2;
  // At the end: (kWarps, kRows, kDim) of out, then (kWarps, kRows, 2) of maxima and sums.
  static constexpr int kOutBytes = kWarps * kRows * kDim * 4;
  static_assert(kOutBytes + kWarps * kRows * 8 <= kSharedBytes);

  using Score = ScoreTile<Element, 1, kScoreTiles>;
  using Out = Accumulators<1, kOutTiles>;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const RowTile tile = locate_row_tile(args, block.index(), kRows);
    const int warp_key = block.thread() / kWarpSize * kWarpKeys;
    const auto bits_of = [&](int first) {
      return tile_bits(args.masking.map, tile.map, tile.first_query, tile.last_query, tile.pack,
                       first, first);
    };
    const auto next_tile = [&](int first) {
      while (first < tile.key_end && !(bits_of(first) & kSomeAttend)) first += kKeys;
      return first;
    };
    const auto load_stage = [&](int stage, int first) {
      if (first < tile.key_end) {
        const std::uint32_t target =
            static_cast<std::uint32_t>(kQueryBytes + 2 * stage * kTileBytes);
        const int count = static_cast<int>(min_of<std::int64_t>(kKeys, shape.kv_len - first));
        load_tile<Element, kKeys, kDim, kThreads, true>(
            block, target, args.key, tile.key_start + first * args.key.row_stride, count,
            static_cast<int>(shape.head_dim));
        load_tile<Element, kKeys, kDim, kThreads, true>(
            block, target + kTileBytes, args.value,
            tile.value_start + first * args.value.row_stride, count,
            static_cast<int>(shape.value_dim));
      }
      block.commit_copies();  // an empty group too: waits count groups
    };

    load_rows<Element, kRows, kDim, kThreads, true>(
        block, 0, args.query, slice_start(args.query, shape, tile.batch, tile.first_head),
        tile.rows, static_cast<int>(shape.head_dim),
        [&](int row) { return tile.row_offset(args.query, row); });
    int first = next_tile(tile.key_begin);
    int newest = first;  // tile of the newest stage
    TORCH_EXT_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage > 0) newest = next_tile(newest + kKeys);
      load_stage(stage, newest);
    }
    OnlineSoftmax<1> softmax;
    softmax.start();
    Out out;
    clear<1, kOutTiles>(out);
    const Score score{shape, args.masking, args.dropout, tile, 0};
    int stage = 0;
    TORCH_EXT_NO_UNROLL
    while (first < tile.key_end) {
      block.template wait_copies<kStages - 1>();
      block.sync();
      const std::uint32_t keys = static_cast<std::uint32_t>(kQueryBytes + 2 * stage * kTileBytes);
      typename Score::Scores scores;
      clear<1, kScoreTiles>(scores);
      multiply_rows<Element, kDim, 1, kScoreTiles>(block, scores, 0, 0, keys, warp_key);
      score.modify(block, bits_of(first), first + warp_key, static_cast<float>(args.scale), scores);
      softmax.update(block, scores, kLog2e, out);
      if (args.dropout.active) {
        score.for_kept(block, first + warp_key, [&](int m, int n, int e, bool kept) {
          if (!kept) scores[m][n][e] = 0.0f;
        });
      }
      multiply_weights<Element, kDim, 1, kScoreTiles, kOutTiles>(block, out, scores,
                                                                 keys + kTileBytes, warp_key, 0);
      block.sync();  // nobody reads this stage any more
      first = next_tile(first + kKeys);
      if (newest < tile.key_end) newest = next_tile(newest + kKeys);
      load_stage(stage, newest);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    block.template wait_copies<0>();
    block.sync();
    softmax.finish(block);
    join(block, args, tile, softmax, out);
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void join(Block& block, const Args& args, const RowTile& tile,
                                    const OnlineSoftmax<1>& softmax, const Out& out) {
    const int warp = block.thread() / kWarpSize;
    const int lane = block.thread() % kWarpSize;
    const auto out_place = [](int of_warp, int row, int col) {
      return static_cast<std::uint32_t>(((of_warp * kRows + row) * kDim + col) * 4);
    };
    const auto stats_place = [](int of_warp, int row) {
      return static_cast<std::uint32_t>(kOutBytes + (of_warp * kRows + row) * 8);
    };
    TORCH_EXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + lane / 4;
      TORCH_EXT_UNROLL
      for (int n = 0; n < kOutTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 2; ++e) {
          block.template shared<float>(out_place(warp, row, 8 * n + lane % 4 * 2 + e)) =
              out[0][n][2 * half + e];
        }
      }
      if (lane % 4 == 0) {
        block.template shared<float>(stats_place(warp, row)) = softmax.maximum[0][half];
        block.template shared<float>(stats_place(warp, row) + 4) = softmax.sum[0][half];
      }
    }
    block.sync();
    const std::int64_t out_start = slice_start(args.out, args.shape, tile.batch, tile.first_head);
    const int value_dim = static_cast<int>(args.shape.value_dim);
    TORCH_EXT_NO_UNROLL
    for (int row = warp; row < tile.rows; row += kWarps) {
      float maximum = -infinity<float>();
      TORCH_EXT_UNROLL
      for (int of = 0; of < kWarps; ++of) {
        maximum = max_of(maximum, block.template shared<float>(stats_place(of, row)));
      }
      const float reference = maximum == -infinity<float>() ? 0.0f : maximum;
      float weight[kWarps];
      float sum = 0.0f;
      TORCH_EXT_UNROLL
      for (int of = 0; of < kWarps; ++of) {
        weight[of] = block.exp2_fast(
            (block.template shared<float>(stats_place(of, row)) - reference) * kLog2e);
        sum += weight[of] * block.template shared<float>(stats_place(of, row) + 4);
      }
      const bool partial = args.partial_out != nullptr;
      const float factor = partial       ? 1.0f
                           : sum == 0.0f ? 0.0f
                                         : static_cast<float>(args.dropout.scale) / sum;
      const std::int64_t row_start = out_start + tile.row_offset(args.out, row);
      for (int d = lane; d < value_dim; d += kWarpSize) {
        float joined = 0.0f;
        TORCH_EXT_UNROLL
        for (int of = 0; of < kWarps; ++of) {
          joined += weight[of] * block.template shared<float>(out_place(of, row, d));
        }
        if (partial) {
          static_cast<float*>(args.partial_out)[partial_row(args, tile, row) * value_dim + d] =
              joined;
        } else {
          store_element<Element>(block, args.out.data, row_start + d * args.out.col_stride,
                                 joined * factor);
        }
      }
      if (lane == 0) store_row_stats(block, args, tile, row, maximum, sum);
    }
  }
};

}  // namespace torch_ext::cuda
