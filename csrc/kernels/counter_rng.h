// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and the
// dropout mask made of it. A pure function of (seed, slice, query, key): the same mask in the
// forward and backward pass, on every instruction set and device, for every thread count.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCH_EXT_HOST_DEVICE __host__ __device__
#else
#define TORCH_EXT_HOST_DEVICE
#endif

namespace torch_ext {

inline constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr std::uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
inline constexpr std::uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

/// One call yields 128 bits: 16 for each of 8 consecutive keys of one query row.
inline constexpr int kDropoutKeysPerCall = 8;

struct PhiloxBlock {
  std::uint32_t word[4];
};

TORCH_EXT_HOST_DEVICE inline PhiloxBlock philox4x32_10(PhiloxBlock counter, std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t{kPhiloxMultiplier0} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{kPhiloxMultiplier1} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return counter;
}

/// Dropout probabilities have a resolution of 2^-16: an element is dropped when its 16 bits lie
/// below this threshold.
TORCH_EXT_HOST_DEVICE constexpr std::uint32_t dropout_threshold(double probability) {
  return static_cast<std::uint32_t>(probability * 65536.0 + 0.5);
}

/// What kept elements are multiplied by: the inverse of the realised keep probability.
TORCH_EXT_HOST_DEVICE constexpr double dropout_scale(std::uint32_t threshold) {
  return threshold >= 65536u ? 0.0 : 65536.0 / (65536.0 - threshold);
}

/// Counter of the block holding (query, key) of slice = batch * query_heads + head. 2^32 queries,
/// 2^35 keys and 2^32 slices are told apart.
TORCH_EXT_HOST_DEVICE inline PhiloxBlock dropout_counter(std::int64_t slice, std::int64_t query,
                                                         std::int64_t key) {
  return {{static_cast<std::uint32_t>(query), static_cast<std::uint32_t>(key / kDropoutKeysPerCall),
           static_cast<std::uint32_t>(slice), 0u}};
}

/// Whether dropout keeps (query, key) of `slice`: the scalar twin of the vector kernels.
TORCH_EXT_HOST_DEVICE inline bool dropout_keeps(std::uint64_t seed, std::uint32_t threshold,
                                                std::int64_t slice, std::int64_t query,
                                                std::int64_t key) {
  const PhiloxBlock block = philox4x32_10(dropout_counter(slice, query, key), seed);
  const int index = static_cast<int>(key % kDropoutKeysPerCall);
  // Selected: GPUs keep in registers only what is not indexed.
  const std::uint32_t low = index / 2 % 2 == 0 ? block.word[0] : block.word[1];
  const std::uint32_t high = index / 2 % 2 == 0 ? block.word[2] : block.word[3];
  const std::uint32_t bits = (index < 4 ? low : high) >> (16 * (index % 2)) & 0xFFFFu;
  return bits >= threshold;
}

}  // namespace torch_ext
