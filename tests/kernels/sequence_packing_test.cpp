#include "kernels/cpu/sequence_packing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace torch_ext {
namespace {

using Numbers = std::vector<std::int64_t>;

Packs packs_of(const Numbers& lengths, std::int64_t capacity, std::int64_t max_sequences = 0) {
  return pack_best_fit_decreasing({.lengths = lengths.data(),
                                   .count = static_cast<std::int64_t>(lengths.size()),
                                   .capacity = capacity,
                                   .max_sequences = max_sequences});
}

/// One pack after the other, each sequence into the fullest that takes it: in O(n^2).
std::vector<Numbers> slowly_packed(const Numbers& lengths, std::int64_t capacity) {
  Numbers order(lengths.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<Numbers> packs;
  Numbers rooms;
  Numbers changed;  // when each pack got its newest sequence: of equal ones the newest is taken
  for (std::size_t k = 0; k < order.size(); ++k) {
    const std::int64_t length = lengths[order[k]];
    std::size_t best = packs.size();
    for (std::size_t p = 0; p < packs.size(); ++p) {
      if (rooms[p] < length) continue;
      if (best == packs.size() || rooms[p] < rooms[best] ||
          (rooms[p] == rooms[best] && changed[p] > changed[best])) {
        best = p;
      }
    }
    if (best == packs.size()) {
      packs.emplace_back();
      rooms.push_back(capacity);
      changed.push_back(0);
    }
    packs[best].push_back(order[k]);
    rooms[best] -= length;
    changed[best] = static_cast<std::int64_t>(k);
  }
  return packs;
}

TEST(SequencePacking, IsBestFitDecreasing) {
  std::mt19937 random(1);
  // A table of rooms, its trees of one to three levels, and a map of them.
  for (const std::int64_t scale : {1, 3, 100, 5000, 1000000007}) {
    for (int round = 0; round < 20; ++round) {
      const std::int64_t capacity = 63 * scale + round;
      Numbers lengths(std::uniform_int_distribution<int>(0, 200)(random));
      std::uniform_int_distribution<std::int64_t> length(0, capacity);
      for (std::int64_t& one : lengths) one = length(random) / (1 + round % 4);
      const Packs packs = packs_of(lengths, capacity);
      const std::vector<Numbers> expected = slowly_packed(lengths, capacity);
      ASSERT_EQ(packs.offsets.size(), expected.size() + 1);
      for (std::size_t p = 0; p < expected.size(); ++p) {
        const Numbers pack(packs.indices.begin() + packs.offsets[p],
                           packs.indices.begin() + packs.offsets[p + 1]);
        ASSERT_EQ(pack, expected[p]) << "capacity " << capacity << ", pack " << p;
      }
    }
  }
}

TEST(SequencePacking, TakesTheEndsOfItsRanges) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(packs_of({}, 5).offsets, Numbers{0});
  EXPECT_EQ(packs_of({0, 0, 0}, 1).offsets, (Numbers{0, 3}));
  EXPECT_EQ(packs_of({kMost, 1, kMost - 1}, kMost).indices, (Numbers{0, 2, 1}));
  EXPECT_EQ(packs_of({1, 1, 1, 1, 1}, 100, 2).offsets, (Numbers{0, 2, 4, 5}));
}

}  // namespace
}  // namespace torch_ext
