// FlashAttention's backward pass on tensor cores: a block takes a tile of keys and streams the
// queries of all heads that share them. Scores are computed transposed,
//   S^T (keys, queries) = K Q^T,  dP^T = V dO^T,
// so that P^T and dS^T leave the accumulators as left operands of dV += P^T dO and dK += dS^T Q;
// dS^T goes through shared memory once, for dQ += dS K.
#pragma once

#include "attention_grad_query_sum.cuh"
#include "attention_row_stats.cuh"
#include "dropout_bits.cuh"
#include "score_mask.cuh"
#include "tensor_core_tile.cuh"

namespace torch_ext::cuda {

template <typename Element_, int kDim_, bool kGeneral_>
struct AttentionBackwardKeysProgram {
  using Args = AttentionBackwardArgs;
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;
  // 128 keys a block where registers and shared memory of every architecture allow it.
  static constexpr int kWarps = kDim == 128 && !kGeneral ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMTiles = kDim == 64 ? 2 : 1;     // of 16 keys, per warp
  static constexpr int kDimParts = kDim == 256 ? 2 : 1;  // warps that share keys, not columns
  static constexpr int kKeys = kWarps / kDimParts * kMTiles * 16;
  static constexpr int kQueries = kDim == 256 ? 32 : 64;
  // Queries whose scores are in registers, beside 128 of sums in two.
  static constexpr int kChunk = kDim == 64 || (kGeneral && kDim == 128) ? 16 : 32;
  static constexpr int kScoreTiles = kChunk / 8;
  static constexpr int kOwnCols = kDim / kDimParts;
  static constexpr int kOwnTiles = kOwnCols / 8;
  // dQ: each warp 16 queries and a part of the columns.
  static constexpr int kQueryTiles = kQueries / 16;
  static constexpr int kSumCols = kDim / (kWarps / kQueryTiles);
  static constexpr int kSumTiles = kSumCols / 8;
  static constexpr int kGradCols = 64;  // a row of dS^T in shared memory: whole swizzles

  static constexpr int kKeyBytes = kKeys * kDim * 2;
  static constexpr int kQueryBytes = kQueries * kDim * 2;
  static constexpr std::uint32_t kKeyTile = 0;
  static constexpr std::uint32_t kValueTile = kKeyTile + kKeyBytes;
  static constexpr std::uint32_t kQueryTile = kValueTile + kKeyBytes;  // two of them
  static constexpr std::uint32_t kGradOutTile = kQueryTile + 2 * kQueryBytes;
  static constexpr std::uint32_t kGradScoreTile = kGradOutTile + kQueryBytes;
  static constexpr std::uint32_t kStats = kGradScoreTile + kKeys * kGradCols * 2;
  static constexpr int kStatsBytes = 2 * kQueries * 4;  // logsumexp, then delta; two of them
  static constexpr int kSharedBytes = static_cast<int>(kStats) + 2 * kStatsBytes;
  static constexpr int kBlocksPerUnit = kWarps == 8 ? 1 : 2;

  using Scores = Accumulators<kMTiles, kScoreTiles>;
  using Gradient = Accumulators<kMTiles, kOwnTiles>;

  struct Place {
    std::int64_t batch;
    std::int64_t kv_head;
    int first_key;
    int keys;
    int query_tiles;  // of a head
    int first_tile;   // of a head, that may see these keys
    int steps;        // query_tiles * group
  };

  TORCH_EXT_DEVICE static Place locate(const Args& args, std::int64_t index) {
    const DeviceShape& shape = args.shape;
    Place place;
    const std::int64_t pair = index / args.tiles;
    place.batch = pair / shape.kv_heads;
    place.kv_head = pair % shape.kv_heads;
    place.first_key = static_cast<int>(index % args.tiles * kKeys);
    place.keys = static_cast<int>(min_of<std::int64_t>(kKeys, shape.kv_len - place.first_key));
    place.query_tiles = static_cast<int>((shape.q_len + kQueries - 1) / kQueries);
    const std::int64_t first_query =
        args.masking.is_causal
            ? max_of<std::int64_t>(place.first_key - args.masking.causal_offset, 0)
            : 0;
    place.first_tile =
        static_cast<int>(min_of<std::int64_t>(first_query / kQueries, place.query_tiles));
    place.steps = place.query_tiles * static_cast<int>(shape.group);
    return place;
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const Place place = locate(args, block.index());
    const int warp = block.thread() / kWarpSize;
    const int key_row = warp / kDimParts * kMTiles * 16;
    const int own_col = warp % kDimParts * kOwnCols;
    const int head_dim = static_cast<int>(shape.head_dim);
    const int value_dim = static_cast<int>(shape.value_dim);
    const std::int64_t first_head = place.kv_head * shape.group;
    const std::int64_t map = map_start(args.masking.map, shape, place.batch, first_head);
    const std::int64_t query_start = slice_start(args.query, shape, place.batch, first_head);
    const std::int64_t grad_start = slice_start(args.grad_out, shape, place.batch, first_head);
    const int first_slice = static_cast<int>(place.batch * shape.query_heads + first_head);

    const auto bits_of = [&](int step) {
      const int first_query = step % place.query_tiles * kQueries;
      return tile_bits(args.masking.map,
                       map + step / place.query_tiles * args.masking.map.head_stride, first_query,
                       min_of(first_query + kQueries, static_cast<int>(shape.q_len)) - 1, 1,
                       place.first_key, place.first_key + place.keys - 1);
    };
    const auto next_step = [&](int step) {
      while (step < place.steps) {
        const int tile = step % place.query_tiles;
        if (tile < place.first_tile) {
          step += place.first_tile - tile;
          if (place.first_tile == place.query_tiles) continue;
        }
        if constexpr (kGeneral) {
          if (!(bits_of(step) & kSomeAttend)) {
            ++step;
            continue;
          }
        }
        break;
      }
      return step;
    };
    const auto load_queries = [&](int step, std::uint32_t stage) {
      const int head = step / place.query_tiles;
      const int first = step % place.query_tiles * kQueries;
      const int count = min_of(kQueries, static_cast<int>(shape.q_len) - first);
      load_tile<kQueries, kDim, kThreads, kGeneral>(
          block, kQueryTile + stage * kQueryBytes, args.query,
          query_start + head * args.query.head_stride + first * args.query.row_stride, count,
          head_dim);
      constexpr int kStatChunks = kQueries * 4 / kCopyBytes;
      if (block.thread() < 2 * kStatChunks) {
        const int which = block.thread() / kStatChunks;
        const int chunk = block.thread() % kStatChunks;
        const float* stats = static_cast<const float*>(args.row_stats) +
                             (std::int64_t{first_slice + head} * 2 + which) * args.padded_rows +
                             first + chunk * 4;
        block.copy_async(kStats + stage * kStatsBytes +
                             static_cast<std::uint32_t>((which * kQueries + chunk * 4) * 4),
                         stats, true);
      }
      block.commit_copies();
    };
    const auto load_grad_out = [&](int step) {
      const int first = step % place.query_tiles * kQueries;
      load_tile<kQueries, kDim, kThreads, kGeneral>(
          block, kGradOutTile, args.grad_out,
          grad_start + step / place.query_tiles * args.grad_out.head_stride +
              first * args.grad_out.row_stride,
          min_of(kQueries, static_cast<int>(shape.q_len) - first), value_dim);
      block.commit_copies();
    };

    Gradient grad_key;
    Gradient grad_value;
    clear<kMTiles, kOwnTiles>(grad_key);
    clear<kMTiles, kOwnTiles>(grad_value);
    int step = next_step(0);
    if (step < place.steps) {
      load_tile<kKeys, kDim, kThreads, kGeneral>(
          block, kKeyTile, args.key,
          slice_start(args.key, shape, place.batch, place.kv_head) +
              place.first_key * args.key.row_stride,
          place.keys, head_dim);
      load_tile<kKeys, kDim, kThreads, kGeneral>(
          block, kValueTile, args.value,
          slice_start(args.value, shape, place.batch, place.kv_head) +
              place.first_key * args.value.row_stride,
          place.keys, value_dim);
      load_queries(step, 0);
      load_grad_out(step);
    }
    std::uint32_t stage = 0;
    TORCH_EXT_NO_UNROLL
    while (step < place.steps) {
      const int next = next_step(step + 1);
      block.template wait_copies<0>();
      block.sync();  // this step's tiles are here, and nobody reads the last dS or queries any more
      if (next < place.steps) load_queries(next, stage ^ 1);
      const std::uint32_t query_tile = kQueryTile + stage * kQueryBytes;
      TORCH_EXT_NO_UNROLL
      for (int chunk = 0; chunk < kQueries; chunk += kChunk) {
        Scores weights;
        Scores grad_scores;
        clear<kMTiles, kScoreTiles>(weights);
        multiply_rows<Element, kDim, kMTiles, kScoreTiles>(block, weights, kKeyTile, key_row,
                                                           query_tile, chunk);
        clear<kMTiles, kScoreTiles>(grad_scores);
        multiply_rows<Element, kDim, kMTiles, kScoreTiles>(block, grad_scores, kValueTile, key_row,
                                                           kGradOutTile, chunk);
        const int head = step / place.query_tiles;
        const int first_query = step % place.query_tiles * kQueries + chunk;
        std::uint32_t bits = 0;
        if constexpr (kGeneral) bits = bits_of(step);
        weigh_tile(block, args, place, head, key_row, first_query,
                   kStats + stage * kStatsBytes + static_cast<std::uint32_t>(chunk * 4), bits,
                   weights, grad_scores);
        multiply_weights<Element, kDim, kMTiles, kScoreTiles, kOwnTiles>(
            block, grad_value, weights, kGradOutTile, chunk, own_col);
        multiply_weights<Element, kDim, kMTiles, kScoreTiles, kOwnTiles>(
            block, grad_key, grad_scores, query_tile, chunk, own_col);
        if (args.grad_query_sum != nullptr && own_col == 0) {
          keep_grad_scores(block, key_row, chunk, grad_scores);
        }
      }
      block.sync();  // dS is here, and nobody reads grad_out any more
      if (next < place.steps) load_grad_out(next);
      if (args.grad_query_sum != nullptr) {
        const std::int64_t slice = first_slice + step / place.query_tiles;
        add_grad_query(block, args, slice, step % place.query_tiles, warp);
      }
      step = next;
      stage ^= 1;
    }
    const Place end = locate(args, block.anew(block.index()));
    store(block, args, args.grad_key, end, key_row, own_col, head_dim,
          static_cast<float>(args.scale), grad_key);
    store(block, args, args.grad_value, end, key_row, own_col, value_dim,
          static_cast<float>(args.dropout.scale), grad_value);
  }

  /// Products become P^T after dropout and dS^T.
  template <typename Block>
  TORCH_EXT_DEVICE static void weigh_tile(Block& block, const Args& args, const Place& place,
                                          int head, int key_row, int first_query,
                                          std::uint32_t stats, std::uint32_t bits, Scores& weights,
                                          Scores& grads) {
    const DeviceMasking& masking = args.masking;
    const int lane = block.thread() % kWarpSize;
    const int key = place.first_key + key_row + lane / 4;
    const int query = first_query + lane % 4 * 2;
    const float factor = static_cast<float>(args.scale) * kLog2e;
    bool masked = place.first_key + kKeys > masking.key_end(first_query, args.shape.kv_len);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int n = 0; n < kScoreTiles; ++n) {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) weights[m][n][e] *= factor;
      }
    }
    if constexpr (kGeneral) {
      if ((bits & kSomeMasked) != 0 || masking.kind == AttentionMaskKind::kAdditive) {
        masked = true;
        add_masks(block, args, place, head, key, query, weights);
      }
      if (args.dropout.active) {
        const std::int64_t slice =
            place.batch * args.shape.query_heads + place.kv_head * args.shape.group + head;
        const float keep_scale = static_cast<float>(args.dropout.scale);
        for_kept_queries<kMTiles, kScoreTiles>(
            block, static_cast<std::uint64_t>(*args.dropout.seed), args.dropout.threshold,
            static_cast<std::uint32_t>(slice), place.first_key + key_row, first_query,
            [&](int m, int n, int e, bool kept) {
              weigh_pair<true>(block, args, key + 16 * m + 8 * (e / 2), query + 8 * n + e % 2,
                               stats + stat_offset(lane, n, e), kept, keep_scale, weights[m][n][e],
                               grads[m][n][e]);
            });
        return;
      }
    }
    const auto weigh_all = [&]<bool kMasked>() {
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        TORCH_EXT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          TORCH_EXT_UNROLL
          for (int e = 0; e < 4; ++e) {
            weigh_pair<kMasked>(block, args, key + 16 * m + 8 * (e / 2), query + 8 * n + e % 2,
                                stats + stat_offset(lane, n, e), true, 1.0f, weights[m][n][e],
                                grads[m][n][e]);
          }
        }
      }
    };
    if (masked) {
      weigh_all.template operator()<true>();
    } else {
      weigh_all.template operator()<false>();
    }
  }

  TORCH_EXT_DEVICE static std::uint32_t stat_offset(int lane, int n, int e) {
    return static_cast<std::uint32_t>((lane % 4 * 2 + 8 * n + e % 2) * 4);
  }

  template <bool kMasked, typename Block>
  TORCH_EXT_DEVICE static void weigh_pair(Block& block, const Args& args, int key, int query,
                                          std::uint32_t stats, bool kept, float keep_scale,
                                          float& weight, float& grad) {
    const float logsumexp = block.template shared<float>(stats);
    const float delta = block.template shared<float>(stats + kQueries * 4);
    float score = weight;
    if constexpr (kMasked) {
      if (key >= args.masking.key_end(query, args.shape.kv_len)) score = -infinity<float>();
    }
    const WeightAndGradient<float> result =
        weigh<float, kMasked>(block, score, grad, logsumexp, delta, kept, keep_scale);
    weight = result.weight;
    grad = result.grad_score;
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void add_masks(Block& block, const Args& args, const Place& place,
                                         int head, int first_key, int first_query, Scores& scores) {
    const DeviceMasking& masking = args.masking;
    const DeviceShape& shape = args.shape;
    const std::int64_t mask_start =
        slice_start(masking.mask, shape, place.batch, place.kv_head * shape.group + head);
    const std::int64_t padding_start = slice_start(masking.padding, shape, place.batch, 0);
    with_mask_type<Element>(masking, [&](auto mask) {
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        TORCH_EXT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          TORCH_EXT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int key = first_key + 16 * m + 8 * (e / 2);
            const int query = first_query + 8 * n + e % 2;
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

  /// dS^T (keys, queries) in shared memory, for all warps.
  template <typename Block>
  TORCH_EXT_DEVICE static void keep_grad_scores(Block& block, int key_row, int chunk,
                                                const Scores& grads) {
    const int lane = block.thread() % kWarpSize;
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = key_row + 16 * m + 8 * half + lane / 4;
        TORCH_EXT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          block.template shared<std::uint32_t>(kGradScoreTile +
                                               swizzled<kGradCols>(row, chunk / 8 + n) +
                                               static_cast<std::uint32_t>(lane % 4 * 4)) =
              block.pack(Element{}, grads[m][n][2 * half], grads[m][n][2 * half + 1]);
        }
      }
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void add_grad_query(Block& block, const Args& args, std::int64_t slice,
                                              int query_tile, int warp) {
    const int lane = block.thread() % kWarpSize;
    const int tile = warp % kQueryTiles;
    const int first_col = warp / kQueryTiles * kSumCols;
    float sum[kSumTiles][4];
    TORCH_EXT_UNROLL
    for (int n = 0; n < kSumTiles; ++n) {
      TORCH_EXT_UNROLL
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
    multiply_columns<Element, kKeys, kGradCols, kDim, kSumTiles>(block, sum, kGradScoreTile,
                                                                 tile * 16, kKeyTile, first_col);
    float* target =
        args.grad_query_sum +
        ((slice * (args.padded_rows / 16) + query_tile * kQueryTiles + tile) * (kDim / 8) +
         first_col / 8) *
            128;
    TORCH_EXT_UNROLL
    for (int n = 0; n < kSumTiles; ++n) {
      if constexpr (Block::kWideAtomics) {
        block.add_global(target + n * 128 + sum_place<true>(lane, 0), sum[n]);
      } else {
        TORCH_EXT_UNROLL
        for (int e = 0; e < 4; ++e) {
          block.add_global(target + n * 128 + sum_place<false>(lane, e), sum[n][e]);
        }
      }
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static void store(Block& block, const Args& args, const DeviceOutput& view,
                                     const Place& place, int key_row, int first_col, int cols,
                                     float factor, const Gradient& gradient) {
    if (view.data == nullptr) return;
    const int lane = block.thread() % kWarpSize;
    const std::int64_t start = slice_start(view, args.shape, place.batch, place.kv_head);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = key_row + 16 * m + 8 * half + lane / 4;
        if (row >= place.keys) continue;
        TORCH_EXT_UNROLL
        for (int n = 0; n < kOwnTiles; ++n) {
          store_pair<Element>(block, view, start + (place.first_key + row) * view.row_stride,
                              first_col + 8 * n + lane % 4 * 2, cols,
                              gradient[m][n][2 * half] * factor,
                              gradient[m][n][2 * half + 1] * factor);
        }
      }
    }
  }
};

}  // namespace torch_ext::cuda
