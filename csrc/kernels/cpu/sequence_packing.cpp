#include "sequence_packing.h"

#include <array>
#include <bit>
#include <cstddef>
#include <map>
#include <utility>

namespace torch_ext {
namespace {

using std::int64_t;

constexpr int64_t kNone = -1;

/// Sequences by falling length, those of one length in their order: a radix sort by 11 bits, whose
/// counters stay in the first-level cache.
std::vector<int64_t> longest_first(const PackingParams& params) {
  constexpr int kBits = 11;
  constexpr int64_t kMask = (int64_t{1} << kBits) - 1;
  std::vector<int64_t> order(static_cast<std::size_t>(params.count));
  for (int64_t i = 0; i < params.count; ++i) order[i] = i;
  std::vector<int64_t> sorted(order.size());
  for (int shift = 0; shift < 63 && (params.capacity >> shift) != 0; shift += kBits) {
    const auto digit = [&](int64_t index) {
      return ((params.capacity - params.lengths[index]) >> shift) & kMask;
    };
    std::array<int64_t, kMask + 2> starts{};
    for (const int64_t index : order) ++starts[digit(index) + 1];
    for (int64_t k = 0; k <= kMask; ++k) starts[k + 1] += starts[k];
    for (const int64_t index : order) sorted[starts[digit(index)]++] = index;
    std::swap(order, sorted);
  }
  return order;
}

/// The newest open pack of each room, for rooms that a table holds. Which rooms there are stands in
/// a tree of bits, 64 a word: the next one is found in as many words as the tree has levels.
class RoomTable {
 public:
  explicit RoomTable(int64_t capacity) : newest_(static_cast<std::size_t>(capacity) + 1, kNone) {
    std::size_t bits = newest_.size();
    do {
      bits = (bits + 63) / 64;
      levels_.emplace_back(bits, 0);
    } while (bits > 1);
  }

  /// The least room that is at least `length`, or kNone.
  int64_t find(int64_t length) const {
    auto at = static_cast<std::size_t>(length);
    for (std::size_t level = 0; level < levels_.size(); ++level) {
      const std::size_t word = at / 64;
      if (word >= levels_[level].size()) return kNone;
      const std::uint64_t bits = levels_[level][word] & (~std::uint64_t{0} << (at % 64));
      if (bits != 0) return descend(level, word * 64 + std::countr_zero(bits));
      at = word + 1;
    }
    return kNone;
  }

  int64_t& newest(int64_t room) { return newest_[static_cast<std::size_t>(room)]; }

  void add(int64_t room) {
    auto at = static_cast<std::size_t>(room);
    for (std::vector<std::uint64_t>& level : levels_) {
      level[at / 64] |= std::uint64_t{1} << (at % 64);
      at /= 64;
    }
  }

  void remove(int64_t room) {
    auto at = static_cast<std::size_t>(room);
    for (std::vector<std::uint64_t>& level : levels_) {
      level[at / 64] &= ~(std::uint64_t{1} << (at % 64));
      if (level[at / 64] != 0) return;
      at /= 64;
    }
  }

 private:
  int64_t descend(std::size_t level, std::size_t at) const {
    while (level-- > 0) at = at * 64 + std::countr_zero(levels_[level][at]);
    return static_cast<int64_t>(at);
  }

  std::vector<int64_t> newest_;
  std::vector<std::vector<std::uint64_t>> levels_;  // of bits; the last has one word
};

/// The same for capacities far beyond the number of sequences.
class RoomMap {
 public:
  explicit RoomMap(int64_t /*capacity*/) {}
  int64_t find(int64_t length) const {
    const auto found = newest_.lower_bound(length);
    return found == newest_.end() ? kNone : found->first;
  }
  int64_t& newest(int64_t room) { return newest_.try_emplace(room, kNone).first->second; }
  void add(int64_t /*room*/) {}
  void remove(int64_t room) { newest_.erase(room); }

 private:
  std::map<int64_t, int64_t> newest_;
};

template <typename Rooms>
Packs pack(const PackingParams& params) {
  const std::vector<int64_t> order = longest_first(params);
  Rooms rooms(params.capacity);
  std::vector<int64_t> older;  // of each open pack, the next one with as much room
  std::vector<int64_t> counts;
  std::vector<int64_t> pack_of(order.size());
  for (std::size_t k = 0; k < order.size(); ++k) {
    const int64_t length = params.lengths[order[k]];
    int64_t room = rooms.find(length);
    int64_t chosen = static_cast<int64_t>(counts.size());
    if (room == kNone) {
      room = params.capacity;
      counts.push_back(0);
      older.push_back(kNone);
    } else {
      int64_t& newest = rooms.newest(room);
      chosen = newest;
      newest = older[chosen];
      if (newest == kNone) rooms.remove(room);
    }
    pack_of[k] = chosen;
    if (++counts[chosen] == params.max_sequences) continue;
    int64_t& newest = rooms.newest(room - length);
    if (newest == kNone) rooms.add(room - length);
    older[chosen] = newest;
    newest = chosen;
  }

  Packs packs;
  packs.offsets.resize(counts.size() + 1);
  for (std::size_t p = 0; p < counts.size(); ++p) {
    packs.offsets[p + 1] = packs.offsets[p] + counts[p];
  }
  packs.indices.resize(order.size());
  std::vector<int64_t> ends(packs.offsets.begin(), packs.offsets.end() - 1);
  for (std::size_t k = 0; k < order.size(); ++k) packs.indices[ends[pack_of[k]]++] = order[k];
  return packs;
}

}  // namespace

Packs pack_best_fit_decreasing(const PackingParams& params) {
  // A table of 8 bytes a room, up to some 40 bytes a sequence.
  const bool is_table = params.capacity / 5 <= params.count + 4096;
  return is_table ? pack<RoomTable>(params) : pack<RoomMap>(params);
}

}  // namespace torch_ext
