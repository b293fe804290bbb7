#include "kernels/attention_extent.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace torch_ext {
namespace {

// The rule once more, in a type that holds every sum.
bool attends(const KeyWindow& window, std::int64_t query, std::int64_t key) {
  const __int128 middle = static_cast<__int128>(query) + window.offset;
  return (window.left == kUnbounded || key >= middle - window.left) &&
         (window.right == kUnbounded || key <= middle + window.right);
}

std::string describe(const KeyWindow& window, Range queries, Range keys) {
  const auto number = [](std::int64_t x) { return std::to_string(x) + " "; };
  return "left " + number(window.left) + "right " + number(window.right) + "offset " +
         number(window.offset) + "queries " + number(queries.begin) + number(queries.end) +
         "keys " + number(keys.begin) + number(keys.end);
}

/// `range` holds exactly the positions of [0, len) for which `holds` is true.
template <typename Holds>
void expect_positions(Range range, std::int64_t len, const Holds& holds) {
  EXPECT_LE(0, range.begin);
  EXPECT_LE(range.begin, range.end);
  EXPECT_LE(range.end, len);
  for (std::int64_t i = 0; i < len; ++i) {
    EXPECT_EQ(i >= range.begin && i < range.end, holds(i)) << "at " << i;
  }
}

std::vector<KeyWindow> windows() {
  std::vector<KeyWindow> result;
  for (const std::int64_t left : {std::int64_t{0}, std::int64_t{1}, std::int64_t{4}, kUnbounded}) {
    for (const std::int64_t right : {std::int64_t{0}, std::int64_t{2}, kUnbounded}) {
      for (const std::int64_t offset : {-20, -3, 0, 1, 5, 20}) {
        result.push_back({left, right, offset});
      }
    }
  }
  return result;
}

TEST(AttentionExtent, KeysOfQueriesAreThoseOfTheRule) {
  constexpr std::int64_t kQueries = 7, kKeys = 9;
  for (const KeyWindow& window : windows()) {
    for (std::int64_t begin = 0; begin < kQueries; ++begin) {
      expect_positions(keys_of(window, begin, kKeys), kKeys,
                       [&](std::int64_t key) { return attends(window, begin, key); });
      for (std::int64_t end = begin + 1; end <= kQueries; ++end) {
        const Range queries{begin, end};
        SCOPED_TRACE(describe(window, queries, {0, kKeys}));
        const auto count = [&](std::int64_t key) {
          std::int64_t sum = 0;
          for (std::int64_t query = begin; query < end; ++query) sum += attends(window, query, key);
          return sum;
        };
        expect_positions(keys_of_any(window, queries, kKeys), kKeys,
                         [&](std::int64_t key) { return count(key) > 0; });
        expect_positions(keys_of_all(window, queries, kKeys), kKeys,
                         [&](std::int64_t key) { return count(key) == end - begin; });
      }
    }
  }
}

TEST(AttentionExtent, QueriesOfKeysAreThoseOfTheRule) {
  constexpr std::int64_t kQueries = 9, kKeys = 7;
  for (const KeyWindow& window : windows()) {
    for (std::int64_t begin = 0; begin < kKeys; ++begin) {
      for (std::int64_t end = begin + 1; end <= kKeys; ++end) {
        const Range keys{begin, end};
        SCOPED_TRACE(describe(window, {0, kQueries}, keys));
        const auto count = [&](std::int64_t query) {
          std::int64_t sum = 0;
          for (std::int64_t key = begin; key < end; ++key) sum += attends(window, query, key);
          return sum;
        };
        expect_positions(queries_of_any(window, keys, kQueries), kQueries,
                         [&](std::int64_t query) { return count(query) > 0; });
        expect_positions(queries_of_all(window, keys, kQueries), kQueries,
                         [&](std::int64_t query) { return count(query) == end - begin; });
      }
    }
  }
}

TEST(AttentionExtent, TilesAreEmptyFullOrMixed) {
  constexpr std::int64_t kQueries = 7, kKeys = 7;
  for (const KeyWindow& window : windows()) {
    for (std::int64_t row = 0; row < kQueries * kQueries; ++row) {
      for (std::int64_t col = 0; col < kKeys * kKeys; ++col) {
        const Range queries{row / kQueries, row % kQueries + 1};
        const Range keys{col / kKeys, col % kKeys + 1};
        if (queries.empty() || keys.empty()) continue;
        std::int64_t count = 0;
        for (std::int64_t query = queries.begin; query < queries.end; ++query) {
          for (std::int64_t key = keys.begin; key < keys.end; ++key) {
            count += attends(window, query, key);
          }
        }
        const TileClass expected = count == 0                              ? TileClass::kEmpty
                                   : count == queries.size() * keys.size() ? TileClass::kFull
                                                                           : TileClass::kMixed;
        EXPECT_EQ(tile_class(window, queries, keys), expected) << describe(window, queries, keys);
      }
    }
  }
}

// Numbers near 0 and near the ends of their type, far beyond what memory holds.
TEST(AttentionExtent, SumsDoNotOverflow) {
  std::mt19937_64 random(1);
  const auto positive = [&] {
    const auto small = static_cast<std::int64_t>(random() % 4);
    return random() % 2 == 0 ? small : INT64_MAX - small;
  };
  for (int i = 0; i < 20000; ++i) {
    const std::int64_t base = positive();
    const KeyWindow window{positive(), positive(),
                           random() % 2 == 0   ? base
                           : random() % 2 == 0 ? -base
                                               : -base - 1};
    const std::int64_t query = positive();
    const std::int64_t key = positive();
    if (query == INT64_MAX || key == INT64_MAX) continue;  // no length has those
    const Range keys = keys_of(window, query, INT64_MAX);
    const Range queries = queries_of_any(window, {key, key + 1}, INT64_MAX);
    const bool expected = attends(window, query, key);
    SCOPED_TRACE(describe(window, {query, query + 1}, {key, key + 1}));
    EXPECT_EQ(key >= keys.begin && key < keys.end, expected);
    EXPECT_EQ(query >= queries.begin && query < queries.end, expected);
    EXPECT_EQ(tile_class(window, {query, query + 1}, {key, key + 1}),
              expected ? TileClass::kFull : TileClass::kEmpty);
  }
}

}  // namespace
}  // namespace torch_ext
