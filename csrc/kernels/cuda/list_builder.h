// The host's half of tensor_list.h: a caller's entries as one launch, or several where they do not
// fit one.
#pragma once

#include <cstdint>

#include "tensor_list.h"

namespace torch_ext::cuda {

/// One entry of the caller's, whatever the kernel.
template <int kOperands>
struct ListItem {
  void* data[kOperands];
  ScalarType types[kOperands];
  std::int64_t count;
  StridedLoop loop;
  bool flag;
};

/// Columns of an entry's tiles: a power of two, so that short dimensions do not leave most of the
/// tile's places empty.
inline int tile_columns_log2(const StridedLoop& loop) {
  const std::int64_t cols = loop.sizes[loop.dims - 1];
  int log2 = 0;
  while (log2 < kMaxTileColumnsLog2 && std::int64_t{1} << log2 < cols) ++log2;
  return log2;
}

inline std::int64_t count_chunks(std::int64_t count, const StridedLoop& loop) {
  if (count == 0) return 0;
  if (loop.dims == 0) return ceil_div(count, kChunkElements);
  const std::int64_t rows = loop.dims >= 2 ? loop.sizes[loop.dims - 2] : 1;
  const std::int64_t cols = loop.sizes[loop.dims - 1];
  const std::int64_t tile_cols = std::int64_t{1} << tile_columns_log2(loop);
  return count / (rows * cols) * ceil_div(rows, kTilePlaces / tile_cols) *
         ceil_div(cols, tile_cols);
}

/// Numbers of a loop's record in the list.
inline std::int64_t loop_numbers(const StridedLoop& loop, int operands) {
  return loop.dims == 0 ? 0 : 1 + (1 + operands) * std::int64_t{loop.dims};
}

template <int kOperands>
std::int64_t item_bytes(const ListItem<kOperands>& item) {
  return static_cast<std::int64_t>(sizeof(ListEntry<kOperands>)) +
         8 * loop_numbers(item.loop, kOperands);
}

/// Fills a list with entries until one does not fit.
template <typename List>
class ListBuilder {
 public:
  using Item = ListItem<List::kOperands>;

  explicit ListBuilder(List& list) : list_(list) {
    list_.first_entry = 0;
    list_.first_chunk = 0;
    clear();
  }

  /// False: the list is full.
  bool add(const Item& item) {
    const std::int64_t chunks = count_chunks(item.count, item.loop);
    const std::int64_t numbers = loop_numbers(item.loop, List::kOperands);
    const auto taken =
        static_cast<std::int64_t>((list_.num_entries + 1) * sizeof(typename List::Entry));
    if (taken + 8 * (numbers_ + numbers) > 8 * List::kNumbers) return false;
    if (chunks + list_.num_chunks > INT32_MAX) return false;  // of a grid
    typename List::Entry& entry = list_.entries[list_.num_entries++];
    entry = {};
    for (int k = 0; k < List::kOperands; ++k) {
      entry.data[k] = item.data[k];
      entry.types = entry.types | static_cast<std::uint32_t>(item.types[k]) << 3 * k;
    }
    entry.count = item.count;
    entry.first_chunk = list_.num_chunks;
    entry.flag = item.flag;
    if (item.loop.dims != 0) add_loop(item.loop, numbers, entry);
    list_.num_chunks += static_cast<std::uint32_t>(chunks);
    return true;
  }

  /// Empties the list for what follows in the caller's.
  void advance() {
    list_.first_entry += list_.num_entries;
    list_.first_chunk += list_.num_chunks;
    clear();
  }

 private:
  void clear() {
    list_.num_entries = 0;
    list_.num_chunks = 0;
    numbers_ = 0;
  }

  void add_loop(const StridedLoop& loop, std::int64_t numbers, typename List::Entry& entry) {
    numbers_ += numbers;
    entry.loop = static_cast<std::uint32_t>(numbers_) & 0x1FFF;
    std::int64_t* record = list_.numbers + (List::kNumbers - numbers_);
    *record++ = loop.dims | std::int64_t{tile_columns_log2(loop)} << 16;
    for (int dim = 0; dim < loop.dims; ++dim) *record++ = loop.sizes[dim];
    for (int i = 0; i < List::kOperands * loop.dims; ++i) *record++ = loop.strides[i];
  }

  List& list_;
  std::int64_t numbers_ = 0;
};

/// Calls `launch(list)` for the entries in order, several times where they do not fit one list.
/// Stops at the first failure and returns it; `too_large` where a single entry has more chunks than
/// a grid has blocks.
template <typename List, typename Status, typename ItemOf, typename Launch>
Status launch_lists(List& list, std::int64_t num_entries, Status success, Status too_large,
                    const ItemOf& item_of, const Launch& launch) {
  ListBuilder<List> builder(list);
  for (std::int64_t i = 0; i < num_entries;) {
    if (builder.add(item_of(i))) {
      ++i;
      continue;
    }
    if (list.num_entries == 0) return too_large;
    const Status status = launch(list);
    if (status != success) return status;
    builder.advance();
  }
  return list.num_entries == 0 ? success : launch(list);
}

/// Whether a caller's entries fit the small list.
template <int kOperands, typename ItemOf>
bool fits_small_list(std::int64_t num_entries, const ItemOf& item_of) {
  std::int64_t bytes = num_entries * static_cast<std::int64_t>(sizeof(ListEntry<kOperands>));
  for (std::int64_t i = 0; i < num_entries && bytes <= kSmallListBytes; ++i) {
    bytes += item_bytes(item_of(i)) - static_cast<std::int64_t>(sizeof(ListEntry<kOperands>));
  }
  return bytes <= kSmallListBytes;
}

}  // namespace torch_ext::cuda
