// Scores of a tile of keys by some queries in the pass over the keys, transposed: products become
// P^T after dropout and dS^T.
#pragma once

#include "attention_key_tile.cuh"
#include "attention_row_stats.cuh"
#include "dropout_bits.cuh"

namespace torch_ext::cuda {

template <typename Tile>
struct AttentionKeyScores {
  using Element = typename Tile::Element;
  using Scores = typename Tile::Scores;
  using Step = typename Tile::Step;
  static constexpr int kMTiles = Tile::kMTiles;
  static constexpr int kScoreTiles = Tile::kScoreTiles;

  const AttentionBackwardArgs& args;
  const KeyTilePlace& place;
  int key_row;  // of this warp's first one in the block's tile

  /// weights: Q K^T, becomes the weights; grads: dO V^T, becomes dS. Queries from first_query on,
  /// of step.head; `stats` is the place of the first one's logsumexp.
  template <typename Block>
  TORCH_EXT_DEVICE void weigh(Block& block, const Step& step, int first_query, std::uint32_t stats,
                              Scores& weights, Scores& grads) const {
    const DeviceMasking& masking = args.masking;
    const float scale = static_cast<float>(args.scale);
    bool masked = place.first_key + Tile::kKeys > masking.key_end(first_query, args.shape.kv_len);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int n = 0; n < kScoreTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) weights[m][n][e] = block.product(weights[m][n][e], scale);
      }
    }
    if constexpr (Tile::kGeneral) {
      if ((step.bits & kSomeMasked) != 0 || masking.kind == AttentionMaskKind::kAdditive) {
        masked = true;
        add_masks(block, step.head, first_query, weights);
      }
      if (args.dropout.active) {
        weigh_dropped(block, step.head, first_query, stats, weights, grads);
        return;
      }
    }
    if (masked) {
      weigh_all<true>(block, first_query, stats, weights, grads);
    } else {
      weigh_all<false>(block, first_query, stats, weights, grads);
    }
  }

  /// dS^T (keys, queries) in shared memory, for all warps.
  template <typename Block>
  TORCH_EXT_DEVICE void keep(Block& block, int chunk, const Scores& grads) const {
    const int lane = block.thread() % kWarpSize;
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = key_row + 16 * m + 8 * half + lane / 4;
        TORCH_EXT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          const std::uint32_t place =
              Tile::kGradScoreTile +
              element_place<Element, Tile::kGradCols>(row, chunk + 8 * n + lane % 4 * 2);
          const float low = grads[m][n][2 * half];
          const float high = grads[m][n][2 * half + 1];
          if constexpr (std::is_same_v<Element, Tf32>) {
            block.template shared<float>(place) = low;
            block.template shared<float>(place + 4) = high;
          } else {
            block.template shared<std::uint32_t>(place) = block.pack(Element{}, low, high);
          }
        }
      }
    }
  }

 private:
  /// This thread's key of accumulators [0][.][0].
  template <typename Block>
  TORCH_EXT_DEVICE int own_key(Block& block) const {
    return place.first_key + key_row + block.anew(block.thread()) % kWarpSize / 4;
  }
  template <typename Block>
  TORCH_EXT_DEVICE static int own_column(Block& block) {
    return block.anew(block.thread()) % 4 * 2;
  }

  template <typename Block>
  TORCH_EXT_DEVICE void weigh_dropped(Block& block, int head, int first_query, std::uint32_t stats,
                                      Scores& weights, Scores& grads) const {
    const std::int64_t slice = place.slice + head;
    const int key = own_key(block);
    const int column = own_column(block);
    const float keep_scale = static_cast<float>(args.dropout.scale);
    for_kept_queries<kMTiles, kScoreTiles>(
        block, static_cast<std::uint64_t>(*args.dropout.seed), args.dropout.threshold,
        static_cast<std::uint32_t>(slice), place.first_key + key_row, first_query,
        [&](int m, int n, int e, bool kept) {
          weigh_pair<true>(block, key + 16 * m + 8 * (e / 2), first_query, column + 8 * n + e % 2,
                           stats, kept, keep_scale, weights[m][n][e], grads[m][n][e]);
        });
  }

  template <bool kMasked, typename Block>
  TORCH_EXT_DEVICE void weigh_all(Block& block, int first_query, std::uint32_t stats,
                                  Scores& weights, Scores& grads) const {
    const int key = own_key(block);
    const int column = own_column(block);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int n = 0; n < kScoreTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          weigh_pair<kMasked>(block, key + 16 * m + 8 * (e / 2), first_query,
                              column + 8 * n + e % 2, stats, true, 1.0f, weights[m][n][e],
                              grads[m][n][e]);
        }
      }
    }
  }

  template <bool kMasked, typename Block>
  TORCH_EXT_DEVICE void weigh_pair(Block& block, int key, int first_query, int column,
                                   std::uint32_t stats, bool kept, float keep_scale, float& weight,
                                   float& grad) const {
    stats += static_cast<std::uint32_t>(column * 4);
    const RowStats<float> row_stats{block.template shared<float>(stats),
                                    block.template shared<float>(stats + Tile::kQueries * 4),
                                    block.template shared<float>(stats + 2 * Tile::kQueries * 4)};
    float score = weight;
    if constexpr (kMasked) {
      if (key >= args.masking.key_end(first_query + column, args.shape.kv_len)) {
        score = -infinity<float>();
      }
    }
    const WeightAndGradient<float> result =
        torch_ext::cuda::weigh<float, kMasked>(block, score, grad, row_stats, kept, keep_scale);
    weight = result.weight;
    grad = result.grad_score;
  }

  template <typename Block>
  TORCH_EXT_DEVICE void add_masks(Block& block, int head, int first_query, Scores& scores) const {
    const DeviceMasking& masking = args.masking;
    const DeviceShape& shape = args.shape;
    const std::int64_t mask_start = place.mask + head * masking.mask.head_stride;
    const std::int64_t padding_start = place.padding;
    const int own = own_key(block);
    const int column = first_query + own_column(block);
    with_mask_type<Element>(masking, [&](auto mask) {
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        TORCH_EXT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          TORCH_EXT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int key = own + 16 * m + 8 * (e / 2);
            const int query = column + 8 * n + e % 2;
            if (key >= shape.kv_len || query >= shape.q_len) continue;
            float& score = scores[m][n][e];
            score = masked_score(
                block, masking, mask, score,
                mask_start + query * masking.mask.row_stride + key * masking.mask.col_stride);
            score = padded_score(block, masking, score,
                                 padding_start + key * masking.padding.col_stride);
          }
        }
      }
    });
  }
};

}  // namespace torch_ext::cuda
