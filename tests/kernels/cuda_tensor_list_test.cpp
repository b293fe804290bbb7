// Lists as kernel parameters: every element of every entry belongs to one thread of one chunk of
// one launch, whatever the sizes and strides.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cuda/list_builder.h"
#include "kernels/cuda/tensor_list.h"

namespace torch_ext::testing {
namespace {

using cuda::kChunkElements;
using cuda::kTilePlaces;
using cuda::ListItem;

/// A loop over sizes with its numbers.
struct OwnedLoop {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;  // (operands, dims)
  StridedLoop loop() const {
    return {static_cast<std::int32_t>(sizes.size()), sizes.data(), strides.data()};
  }
};

ListItem<2> dense_item(std::int64_t count) {
  return {{nullptr, nullptr}, {ScalarType::kFloat32, ScalarType::kBFloat16}, count, {}, false};
}

/// A copy of each list that launching `items` makes.
template <int kBytes>
std::vector<std::unique_ptr<cuda::TensorList<2, kBytes>>> lists_of(
    const std::vector<ListItem<2>>& items) {
  using List = cuda::TensorList<2, kBytes>;
  const auto list = std::make_unique<List>();
  std::vector<std::unique_ptr<List>> lists;
  cuda::launch_lists(
      *list, static_cast<std::int64_t>(items.size()), 0, 1,
      [&](std::int64_t i) { return items[static_cast<std::size_t>(i)]; },
      [&](const List& full) {
        lists.push_back(std::make_unique<List>(full));
        return 0;
      });
  return lists;
}

TEST(CudaTensorList, HoldsHundredsOfTensors) {
  EXPECT_LE(sizeof(cuda::ListEntry<2>), 32u);
  EXPECT_LE(sizeof(cuda::ListEntry<6>), 64u);
  const std::vector<ListItem<2>> items(1000, dense_item(64));
  EXPECT_EQ(lists_of<cuda::kLargeListBytes>(items).size(), 1u);
  EXPECT_EQ(lists_of<cuda::kSmallListBytes>(items).size(), 9u);
  const auto item_of = [&](std::int64_t i) { return items[static_cast<std::size_t>(i)]; };
  EXPECT_TRUE(cuda::fits_small_list<2>(120, item_of));
  EXPECT_FALSE(cuda::fits_small_list<2>(121, item_of));
}

TEST(CudaTensorList, FitsTheParametersOfAKernel) {
  // 4096 and 32764 bytes, less what the programs take beside the list.
  EXPECT_LE(sizeof(cuda::TensorList<6, cuda::kSmallListBytes>), 4096u - 200u);
  EXPECT_LE(sizeof(cuda::TensorList<6, cuda::kLargeListBytes>), 32764u - 400u);
}

TEST(CudaTensorList, FindsTheEntryOfEachChunk) {
  for (int variant = 0; variant < 4; ++variant) {
    std::vector<ListItem<2>> items;
    for (const std::int64_t count :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{0}, std::int64_t{0},
          std::int64_t{kChunkElements}, std::int64_t{kChunkElements + 1},
          std::int64_t{5 * kChunkElements - 1}, std::int64_t{0}}) {
      for (int repeat = 0; repeat <= variant; ++repeat) items.push_back(dense_item(count));
    }
    const auto lists = lists_of<cuda::kLargeListBytes>(items);
    ASSERT_EQ(lists.size(), 1u);
    const auto& list = *lists[0];
    std::uint32_t chunk = 0;
    for (int i = 0; i < list.num_entries; ++i) {
      const std::int64_t chunks = cuda::count_chunks(list.entries[i].count, {});
      EXPECT_EQ(list.entries[i].first_chunk, chunk);
      for (std::int64_t own = 0; own < chunks; ++own) {
        EXPECT_EQ(cuda::entry_of_chunk(list, chunk++), i);
      }
    }
    EXPECT_EQ(list.num_chunks, chunk);
  }
}

TEST(CudaTensorList, GoesOnWhereTheLastLaunchEnded) {
  OwnedLoop loop{{3, 5, 7}, {35, 7, 1, 1, 3, 15}};
  std::vector<ListItem<2>> items;
  std::int64_t chunks = 0;
  for (int i = 0; i < 700; ++i) {
    items.push_back(dense_item(i * 97));
    if (i % 3 == 0) {
      items.back().count = 105;
      items.back().loop = loop.loop();
    }
    items.back().types[0] = static_cast<ScalarType>(i % 4);
    items.back().flag = i % 5 == 0;
    chunks += cuda::count_chunks(items.back().count, items.back().loop);
  }
  std::int64_t entry_index = 0;
  std::int64_t chunk_index = 0;
  for (const auto& list : lists_of<cuda::kSmallListBytes>(items)) {
    EXPECT_EQ(list->first_entry, entry_index);
    EXPECT_EQ(list->first_chunk, chunk_index);
    for (int i = 0; i < list->num_entries; ++i, ++entry_index) {
      const ListItem<2>& item = items[static_cast<std::size_t>(entry_index)];
      const auto& entry = list->entries[i];
      EXPECT_EQ(entry.count, item.count);
      EXPECT_EQ(entry.type(0), item.types[0]);
      EXPECT_EQ(entry.type(1), item.types[1]);
      EXPECT_EQ(entry.flag != 0, item.flag);
      ASSERT_EQ(entry.loop != 0, item.loop.dims != 0);
      if (entry.loop == 0) continue;
      const cuda::LoopView view = cuda::loop_view(*list, entry);
      ASSERT_EQ(view.dims, 3);
      EXPECT_EQ(view.tile_columns_log2, 3);  // of 7 columns
      for (int dim = 0; dim < 3; ++dim) EXPECT_EQ(view.sizes[dim], loop.sizes[dim]);
      for (int k = 0; k < 6; ++k) EXPECT_EQ(view.strides[k], loop.strides[k]);
    }
    chunk_index += list->num_chunks;
  }
  EXPECT_EQ(entry_index, 700);
  EXPECT_EQ(chunk_index, chunks);
}

TEST(CudaTensorList, StopsAtTheFirstFailure) {
  using List = cuda::TensorList<2, cuda::kSmallListBytes>;
  const auto list = std::make_unique<List>();
  int launches = 0;
  const int status = cuda::launch_lists(
      *list, 1000, 0, 1, [](std::int64_t) { return dense_item(1); },
      [&](const List&) { return ++launches == 2 ? 7 : 0; });
  EXPECT_EQ(status, 7);
  EXPECT_EQ(launches, 2);
}

TEST(CudaTensorList, RefusesMoreChunksThanAGridHasBlocks) {
  using List = cuda::TensorList<2, cuda::kSmallListBytes>;
  const auto list = std::make_unique<List>();
  constexpr std::int64_t kMost = std::int64_t{INT32_MAX} * kChunkElements;
  int launches = 0;
  const auto launch = [&](const List& full) {
    EXPECT_EQ(full.num_entries, 1);
    ++launches;
    return 0;
  };
  // Two that fit a grid each, but not one together; then one that fits none.
  const std::int64_t counts[] = {kMost, kMost, kMost + 1};
  const auto item_of = [&](std::int64_t i) { return dense_item(counts[i]); };
  EXPECT_EQ(cuda::launch_lists(*list, 2, 0, 1, item_of, launch), 0);
  EXPECT_EQ(launches, 2);
  EXPECT_EQ(cuda::launch_lists(*list, 3, 0, 1, item_of, launch), 1);
}

/// Marks each element that the threads of all chunks of an entry visit.
std::vector<int> visits_of(const OwnedLoop& owned, std::int64_t count) {
  ListItem<2> item = dense_item(count);
  item.loop = owned.loop();
  const auto lists = lists_of<cuda::kSmallListBytes>({item});
  const auto& list = *lists.at(0);
  const cuda::LoopView loop = cuda::loop_view(list, list.entries[0]);
  std::vector<int> visits(static_cast<std::size_t>(count), 0);
  for (std::uint32_t chunk = 0; chunk < list.num_chunks; ++chunk) {
    const cuda::ListTile tile = cuda::list_tile(loop, chunk);
    const cuda::TilePlace place = cuda::tile_place(loop, tile, 0);
    EXPECT_GT(tile.rows * tile.cols, 0);
    for (int slot = 0; slot < kTilePlaces; ++slot) {
      const std::int64_t row = slot >> loop.tile_columns_log2;
      const std::int64_t col = slot & ((1 << loop.tile_columns_log2) - 1);
      if (row >= tile.rows || col >= tile.cols) continue;
      const std::int64_t offset = place.offset + row * place.row_stride + col * place.col_stride;
      EXPECT_EQ(offset, place.offset + cuda::element_place(loop, 0, row, col));
      ++visits.at(static_cast<std::size_t>(offset));
    }
  }
  return visits;
}

TEST(CudaTensorList, TilesCoverEveryElementOnce) {
  const std::vector<std::vector<std::int64_t>> shapes{
      {1},          {5000},       {1, 1},       {4096, 1},      {4097, 1}, {1, 128},
      {33, 129},    {32, 128},    {200, 3},     {3, 200},       {2, 3, 5}, {3, 70, 70},
      {2, 2, 2, 2}, {5, 1, 9000}, {7, 5000, 1}, {2, 3, 4, 5, 6}};
  for (const std::vector<std::int64_t>& sizes : shapes) {
    OwnedLoop loop{sizes, std::vector<std::int64_t>(2 * sizes.size(), 0)};
    std::int64_t count = 1;
    for (std::size_t dim = sizes.size(); dim-- > 0;) {
      loop.strides[dim] = count;
      count *= sizes[dim];
    }
    for (const int visits : visits_of(loop, count)) ASSERT_EQ(visits, 1);
  }
}

TEST(CudaTensorList, CountsBeyondThirtyTwoBits) {
  constexpr std::int64_t kCount = (std::int64_t{1} << 33) + 5;
  EXPECT_EQ(cuda::count_chunks(kCount, {}), (std::int64_t{1} << 19) + 1);
  // (2^20, 3, 2^13) elements whose first operand's rows lie 2^15 apart.
  OwnedLoop owned{{1 << 20, 3, 1 << 13}, {3LL << 15, 1 << 15, 1, 1, 1LL << 33, 1LL << 20}};
  ListItem<2> item = dense_item(3LL << 33);
  item.loop = owned.loop();
  const auto lists = lists_of<cuda::kSmallListBytes>({item});
  const auto& list = *lists.at(0);
  const cuda::LoopView loop = cuda::loop_view(list, list.entries[0]);
  // A tile has 128 of 8192 columns and all three rows.
  ASSERT_EQ(list.num_chunks, 64u << 20);
  const cuda::ListTile tile = cuda::list_tile(loop, list.num_chunks - 1);
  EXPECT_EQ(tile.outer, (1 << 20) - 1);
  EXPECT_EQ(tile.row, 0);
  EXPECT_EQ(tile.rows, 3);
  EXPECT_EQ(tile.col, 8192 - 128);
  EXPECT_EQ(cuda::tile_place(loop, tile, 0).offset, ((1LL << 20) - 1) * (3LL << 15) + 8192 - 128);
  EXPECT_EQ(cuda::tile_place(loop, tile, 1).offset,
            ((1LL << 20) - 1) + (8192LL - 128) * (1LL << 20));
  EXPECT_EQ(cuda::tile_place(loop, tile, 1).row_stride, 1LL << 33);
}

TEST(CudaTensorList, TakesAsManyDimensionsAsTorchHas) {
  OwnedLoop loop{std::vector<std::int64_t>(64, 1), std::vector<std::int64_t>(128, 1)};
  ListItem<2> item = dense_item(1);
  item.loop = loop.loop();
  EXPECT_EQ(lists_of<cuda::kSmallListBytes>({item}).size(), 1u);
  EXPECT_LE(8 * cuda::loop_numbers(item.loop, 6) + 64, cuda::kSmallListBytes);
}

}  // namespace
}  // namespace torch_ext::testing
