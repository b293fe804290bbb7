// The dropout mask in the fragments of the tensor cores. One Philox call tells the fate of 8 keys
// of a query; each thread makes every fourth or eighth one that its neighbours need, and they
// exchange the eight bits.
#pragma once

#include <cstdint>

#include "../counter_rng.h"
#include "device_program.h"

namespace torch_ext::cuda {

/// Bit i: key 8 * key_group + i of `query` is kept.
TORCH_EXT_HOST_DEVICE inline std::uint32_t kept_keys(std::uint64_t seed, std::uint32_t threshold,
                                                     std::uint32_t slice, std::uint32_t query,
                                                     std::uint32_t key_group) {
  const PhiloxBlock block = philox4x32_10({{query, key_group, slice, 0u}}, seed);
  std::uint32_t bits = 0;
  TORCH_EXT_UNROLL
  for (int i = 0; i < kDropoutKeysPerCall; ++i) {
    const std::uint32_t draw = block.word[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
    bits |= static_cast<std::uint32_t>(draw >= threshold) << i;
  }
  return bits;
}

/// Rows are queries, columns keys from first_key, a multiple of 8. query_of(m, half) and
/// slice_of(m, half) of this thread's rows. visit(m, n, e, kept) for each accumulator.
template <int kMTiles, int kNTiles, typename Block, typename QueryOf, typename SliceOf,
          typename Visit>
TORCH_EXT_DEVICE void for_kept_keys(Block& block, std::uint64_t seed, std::uint32_t threshold,
                                    int first_key, QueryOf query_of, SliceOf slice_of,
                                    Visit visit) {
  static_assert(kNTiles % 2 == 0);
  constexpr int kStep = kNTiles % 4 == 0 ? 4 : 2;  // tiles whose calls the quad shares
  const int lane = block.thread() % kWarpSize;
  const int own = lane % 4;
  TORCH_EXT_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    TORCH_EXT_UNROLL
    for (int half = 0; half < 2; ++half) {
      TORCH_EXT_UNROLL
      for (int n = 0; n < kNTiles; n += kStep) {
        const std::uint32_t group = static_cast<std::uint32_t>(first_key / 8 + n + own % kStep);
        const std::uint32_t mine =
            kept_keys(seed, threshold, slice_of(m, half), query_of(m, half), group);
        TORCH_EXT_UNROLL
        for (int s = 0; s < kStep; ++s) {
          const std::uint32_t bits = block.shuffle(mine, (lane & ~3) | s) >> (2 * own);
          visit(m, n + s, 2 * half, (bits & 1u) != 0);
          visit(m, n + s, 2 * half + 1, (bits & 2u) != 0);
        }
      }
    }
  }
}

/// Rows are keys from first_key, a multiple of 8; columns queries from first_query, of one slice.
template <int kMTiles, int kNTiles, typename Block, typename Visit>
TORCH_EXT_DEVICE void for_kept_queries(Block& block, std::uint64_t seed, std::uint32_t threshold,
                                       std::uint32_t slice, int first_key, int first_query,
                                       Visit visit) {
  static_assert(kNTiles % 2 == 0);
  const int lane = block.thread() % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  TORCH_EXT_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    TORCH_EXT_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      // The eight lanes of a column share eight calls: bit 0 of g: which of the two queries,
      // bit 1: which half of the keys, bit 2: which tile.
      const int query = first_query + 8 * (n + (g >> 2)) + 2 * t + (g & 1);
      const int group = first_key / 8 + 2 * m + (g >> 1 & 1);
      const std::uint32_t mine =
          kept_keys(seed, threshold, slice, static_cast<std::uint32_t>(query),
                    static_cast<std::uint32_t>(group));
      TORCH_EXT_UNROLL
      for (int call = 0; call < 8; ++call) {
        const std::uint32_t bits = block.shuffle(mine, call * 4 + t) >> g;
        visit(m, n + (call >> 2), 2 * (call >> 1 & 1) + (call & 1), (bits & 1u) != 0);
      }
    }
  }
}

}  // namespace torch_ext::cuda
