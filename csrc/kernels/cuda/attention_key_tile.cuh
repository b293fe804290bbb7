// How a block of the backward pass over the keys is laid out: its tile of keys, the queries that
// it streams, and its shared memory.
#pragma once

#include "device_attention.h"
#include "score_mask.cuh"
#include "tile_layout.cuh"

namespace torch_ext::cuda {

/// Where a block works. In shared memory: registers that wait through the products get spilled.
struct KeyTilePlace {
  // Elements of (batch, first head that shares the keys), or of the kv head.
  std::int64_t query;
  std::int64_t grad_out;
  std::int64_t mask;
  std::int64_t padding;
  std::int64_t map;
  std::int64_t slice;  // batch * query_heads + first head
  std::int64_t batch;
  std::int64_t kv_head;
  int first_key;
  int keys;
  int query_tiles;  // of a head
  int first_tile;   // of a head, that may see these keys
};

template <typename Element_, int kDim_, bool kGeneral_>
struct AttentionKeyTile {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kBytes = kElementBytes<Element>;
  // 128 keys a block where registers and shared memory of every architecture allow it.
  static constexpr int kWarps = kDim == 128 && !kGeneral ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMTiles = kDim * kBytes == 128 ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kDimParts = kDim == 256 ? 2 : 1;  // warps that share keys, not columns
  static constexpr int kKeys = kWarps / kDimParts * kMTiles * 16;
  static constexpr int kQueries = kDim * kBytes == 512 ? 32 : 64;
  // Queries whose scores are in registers, beside 128 of sums in two.
  static constexpr int kChunk = (kDim == 64 && kMTiles == 2) || (kGeneral && kDim == 128) ? 16 : 32;
  static constexpr int kScoreTiles = kChunk / 8;
  static constexpr int kOwnCols = kDim / kDimParts;
  static constexpr int kOwnTiles = kOwnCols / 8;
  // dQ: each warp 16 queries and a part of the columns.
  static constexpr int kQueryTiles = kQueries / 16;
  static constexpr int kSumCols = kDim / (kWarps / kQueryTiles);
  static constexpr int kSumTiles = kSumCols / 8;
  // A row of dS^T in shared memory: whole swizzles.
  static constexpr int kGradCols = kBytes == 2 ? 64 : kQueries;

  static constexpr int kKeyBytes = kKeys * kDim * kBytes;
  static constexpr int kQueryBytes = kQueries * kDim * kBytes;
  static constexpr std::uint32_t kKeyTile = 0;
  static constexpr std::uint32_t kValueTile = kKeyTile + kKeyBytes;
  static constexpr std::uint32_t kQueryTile = kValueTile + kKeyBytes;  // two of them
  static constexpr std::uint32_t kGradOutTile = kQueryTile + 2 * kQueryBytes;
  static constexpr std::uint32_t kGradScoreTile = kGradOutTile + kQueryBytes;
  static constexpr std::uint32_t kStats = kGradScoreTile + kKeys * kGradCols * kBytes;
  static constexpr int kStatsBytes =
      kRowStats * kQueries * 4;  // of a stage, of which there are two
  static constexpr std::uint32_t kPlace = kStats + 2 * kStatsBytes;
  static constexpr int kSharedBytes = static_cast<int>(kPlace + sizeof(KeyTilePlace));

  using Scores = Accumulators<kMTiles, kScoreTiles>;
  using Gradient = Accumulators<kMTiles, kOwnTiles>;

  TORCH_EXT_DEVICE static KeyTilePlace locate(const AttentionBackwardArgs& args,
                                              std::int64_t index) {
    const DeviceShape& shape = args.shape;
    KeyTilePlace place;
    const std::int64_t pair = index / args.tiles;
    place.batch = pair / shape.kv_heads;
    place.kv_head = pair % shape.kv_heads;
    const std::int64_t head = place.kv_head * shape.group;
    place.query = slice_start(args.query, shape, place.batch, head);
    place.grad_out = slice_start(args.grad_out, shape, place.batch, head);
    place.mask = slice_start(args.masking.mask, shape, place.batch, head);
    place.padding = slice_start(args.masking.padding, shape, place.batch, 0);
    place.map = map_start(args.masking.map, shape, place.batch, head);
    place.slice = place.batch * shape.query_heads + head;
    place.first_key = static_cast<int>(index % args.tiles * kKeys);
    place.keys = static_cast<int>(min_of<std::int64_t>(kKeys, shape.kv_len - place.first_key));
    place.query_tiles = static_cast<int>((shape.q_len + kQueries - 1) / kQueries);
    const std::int64_t first_query =
        args.masking.is_causal
            ? max_of<std::int64_t>(place.first_key - args.masking.causal_offset, 0)
            : 0;
    place.first_tile =
        static_cast<int>(min_of<std::int64_t>(first_query / kQueries, place.query_tiles));
    return place;
  }

  /// A tile of queries of one of the heads that share the keys.
  struct Step {
    int head;
    int tile;
    std::uint32_t bits;  // of the map around this tile and the keys

    TORCH_EXT_DEVICE int first_query() const { return tile * kQueries; }
    TORCH_EXT_DEVICE int queries(const DeviceShape& shape) const {
      return min_of(kQueries, static_cast<int>(shape.q_len) - first_query());
    }
  };

  /// The first one at or behind (head, tile) that has pairs that attend; none: head = group.
  TORCH_EXT_DEVICE static Step settle(const AttentionBackwardArgs& args, const KeyTilePlace& place,
                                      int head, int tile) {
    const int group = static_cast<int>(args.shape.group);
    Step step{head, tile, kSomeAttend};
    TORCH_EXT_NO_UNROLL
    while (step.head < group) {
      if (step.tile >= place.query_tiles) {
        step.tile = place.first_tile;
        ++step.head;
        // Causality hides these keys from every query.
        if (place.first_tile == place.query_tiles) step.head = group;
        continue;
      }
      if constexpr (kGeneral) {
        const TileMap& map = args.masking.map;
        step.bits = tile_bits(map, place.map + step.head * map.head_stride, step.first_query(),
                              step.first_query() + step.queries(args.shape) - 1, 1, place.first_key,
                              place.first_key + place.keys - 1);
        if (!(step.bits & kSomeAttend)) {
          ++step.tile;
          continue;
        }
      }
      break;
    }
    return step;
  }
};

}  // namespace torch_ext::cuda
