#include "kernels/counter_rng.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace torch_ext {
namespace {

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t seed) {
  const PhiloxBlock block = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, seed);
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

// Known answers of the Random123 distribution (kat_vectors: philox4x32 10).
TEST(Philox, ZeroCounterAndKey) {
  EXPECT_EQ(philox({0, 0, 0, 0}, 0),
            (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

TEST(Philox, AllOnes) {
  EXPECT_EQ(philox({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, DigitsOfPi) {
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822),
            (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(DropoutThreshold, HasSixteenBits) {
  EXPECT_EQ(dropout_threshold(0.0), 0u);
  EXPECT_EQ(dropout_threshold(0.5), 32768u);
  EXPECT_EQ(dropout_threshold(1.0), 65536u);
  EXPECT_EQ(dropout_threshold(0.1), 6554u);
}

TEST(DropoutScale, InvertsTheRealisedProbability) {
  EXPECT_EQ(dropout_scale(0), 1.0);
  EXPECT_EQ(dropout_scale(32768), 2.0);
  EXPECT_EQ(dropout_scale(65535), 65536.0);
  EXPECT_EQ(dropout_scale(65536), 0.0);
}

TEST(DropoutKeeps, EdgesAreExact) {
  for (std::int64_t key = 0; key < 64; ++key) {
    EXPECT_TRUE(dropout_keeps(7, dropout_threshold(0.0), 0, 0, key));
    EXPECT_FALSE(dropout_keeps(7, dropout_threshold(1.0), 0, 0, key));
  }
}

TEST(DropoutKeeps, TakesSixteenBitsOfTheBlockOfEightKeys) {
  const std::int64_t slice = 5;
  const std::int64_t query = 11;
  const std::uint64_t seed = 0x123456789abcdef;
  for (std::int64_t key = 0; key < 32; ++key) {
    const auto words = philox({11, static_cast<std::uint32_t>(key / 8), 5, 0}, seed);
    const std::uint32_t word = words[key % 8 / 2];
    const std::uint32_t bits = key % 2 == 0 ? word & 0xFFFF : word >> 16;
    EXPECT_TRUE(dropout_keeps(seed, bits, slice, query, key)) << key;
    EXPECT_FALSE(dropout_keeps(seed, bits + 1, slice, query, key)) << key;
  }
}

TEST(DropoutKeeps, IsAFairAndIndependentCoin) {
  constexpr int kQueries = 128;
  constexpr int kKeys = 256;
  const std::uint32_t threshold = dropout_threshold(0.3);
  for (const std::uint64_t seed : {0ull, 1ull, 0xffffffff00000000ull}) {
    int kept = 0;
    int agrees_with_next_query = 0;
    int agrees_with_next_key = 0;
    int agrees_with_next_slice = 0;
    for (int query = 0; query < kQueries; ++query) {
      for (int key = 0; key < kKeys; ++key) {
        const bool here = dropout_keeps(seed, threshold, 0, query, key);
        kept += here;
        agrees_with_next_query += here == dropout_keeps(seed, threshold, 0, query + 1, key);
        agrees_with_next_key += here == dropout_keeps(seed, threshold, 0, query, key + 1);
        agrees_with_next_slice += here == dropout_keeps(seed, threshold, 1, query, key);
      }
    }
    const double count = kQueries * kKeys;
    const double deviation = 5.0 * std::sqrt(0.7 * 0.3 / count);  // five sigma
    EXPECT_NEAR(kept / count, 0.7, deviation);
    for (const int agreements :
         {agrees_with_next_query, agrees_with_next_key, agrees_with_next_slice}) {
      EXPECT_NEAR(agreements / count, 0.7 * 0.7 + 0.3 * 0.3, 2 * deviation);
    }
  }
}

TEST(DropoutKeeps, TellsSeedsApartInBothHalves) {
  const std::uint32_t threshold = dropout_threshold(0.5);
  std::vector<std::vector<bool>> masks;
  for (const std::uint64_t seed : {0ull, 1ull, 1ull << 32, 1ull << 63}) {
    std::vector<bool> mask;
    for (int key = 0; key < 128; ++key) mask.push_back(dropout_keeps(seed, threshold, 0, 0, key));
    for (const std::vector<bool>& other : masks) EXPECT_NE(mask, other);
    masks.push_back(mask);
  }
}

}  // namespace
}  // namespace torch_ext
