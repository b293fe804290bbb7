// How a list is cut into blocks and tasks: sizes up to beyond 2^31 elements, without memory.
#include "kernels/cpu/list_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "thread_task_runner.h"

namespace torch_ext {
namespace {

using testing::ReversedTaskRunner;
using testing::ThreadTaskRunner;

constexpr std::int64_t kHuge = (std::int64_t{1} << 31) + 5;

AccumulateEntry dense(std::int64_t count) { return {.count = count}; }

struct Piece {
  std::int64_t entry, first, end;
  bool operator<(const Piece& other) const {
    return entry != other.entry ? entry < other.entry : first < other.first;
  }
};

std::vector<Piece> pieces_of(const std::vector<AccumulateEntry>& entries,
                             const TaskRunner& runner) {
  std::vector<Piece> pieces;
  std::mutex mutex;
  run_list(runner, entries.data(), static_cast<std::int64_t>(entries.size()),
           [&](std::int64_t entry, std::int64_t first, std::int64_t end) {
             const std::lock_guard<std::mutex> lock(mutex);
             pieces.push_back({entry, first, end});
           });
  std::sort(pieces.begin(), pieces.end());
  return pieces;
}

/// Each block of each entry exactly once, nothing empty.
void expect_complete(const std::vector<AccumulateEntry>& entries, const TaskRunner& runner) {
  const std::vector<Piece> pieces = pieces_of(entries, runner);
  std::size_t next = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::int64_t blocks = count_blocks(entries[i].count, entries[i].loop);
    std::int64_t block = 0;
    while (block < blocks) {
      ASSERT_LT(next, pieces.size()) << "entry " << i;
      ASSERT_EQ(pieces[next].entry, static_cast<std::int64_t>(i));
      ASSERT_EQ(pieces[next].first, block);
      ASSERT_GT(pieces[next].end, block);
      block = pieces[next++].end;
    }
    ASSERT_EQ(block, blocks);
  }
  EXPECT_EQ(next, pieces.size());
}

std::vector<std::vector<AccumulateEntry>> lists() {
  std::vector<std::vector<AccumulateEntry>> lists = {
      {},
      {dense(0)},
      {dense(1)},
      {dense(0), dense(0), dense(3), dense(0)},
      {dense(kListBlock)},
      {dense(kListBlock + 1)},
      {dense(10'000'000), dense(1), dense(10'000'000)},
      {dense(kHuge)},
      {dense(5 * kHuge), dense(17), dense(kHuge)},
      std::vector<AccumulateEntry>(2000, dense(64)),
      std::vector<AccumulateEntry>(96, dense(600'000)),
      std::vector<AccumulateEntry>(300, dense(0)),
  };
  std::vector<AccumulateEntry> mixed;
  for (std::int64_t i = 0; i < 500; ++i) mixed.push_back(dense(i * i * i % 70'000));
  lists.push_back(mixed);
  return lists;
}

TEST(ListSchedule, RunsEachBlockOnce) {
  for (const std::vector<AccumulateEntry>& entries : lists()) {
    expect_complete(entries, SerialTaskRunner());
    for (const int workers : {2, 3, 7, 64, 200}) {
      expect_complete(entries, ReversedTaskRunner(workers));
    }
    expect_complete(entries, ThreadTaskRunner(4));
  }
}

TEST(ListSchedule, StridedEntriesToo) {
  const std::int64_t sizes[] = {5, 300, 700};
  const std::int64_t strides[] = {210000, 700, 1, 210000, 1, 300};
  const AccumulateEntry strided{.count = 5 * 300 * 700, .loop = {3, sizes, strides}};
  const std::int64_t one_size[] = {1001};
  const std::int64_t one_stride[] = {3, 2};
  const AccumulateEntry line{.count = 1001, .loop = {1, one_size, one_stride}};
  for (const int workers : {1, 2, 5}) {
    expect_complete({strided, dense(100), line, strided, line}, ReversedTaskRunner(workers));
  }
}

TEST(ListSchedule, BalancesElementsNotTensors) {
  // One large tensor among many small ones: no task takes more than a small share of the whole.
  std::vector<AccumulateEntry> entries(1000, dense(64));
  entries.insert(entries.begin() + 500, dense(50'000'000));
  for (const int workers : {1, 2, 8}) {
    const ListSchedule schedule(entries.data(), static_cast<std::int64_t>(entries.size()), workers);
    EXPECT_GE(schedule.num_tasks(), 8 * workers);
    for (std::int64_t task = 0; task < schedule.num_tasks(); ++task) {
      const ListPosition begin = schedule.task_begin(task);
      const ListPosition end = schedule.task_end(task);
      const std::int64_t large_begin = begin.entry < 500    ? 0
                                       : begin.entry == 500 ? begin.block * kListBlock
                                                            : 50'000'000;
      const std::int64_t large_end = end.entry < 500    ? 0
                                     : end.entry == 500 ? end.block * kListBlock
                                                        : 50'000'000;
      EXPECT_LE(large_end - large_begin, 50'000'000 / (4 * workers));
    }
  }
}

TEST(ListSchedule, SmallListsAreFewTasks) {
  const std::vector<AccumulateEntry> entries(30, dense(64));
  const ListSchedule schedule(entries.data(), 30, 8);
  EXPECT_LE(schedule.num_tasks(), 4);
}

TEST(ListSchedule, BlocksDoNotDependOnTheWorkers) {
  for (const std::vector<AccumulateEntry>& entries : lists()) {
    for (const AccumulateEntry& entry : entries) {
      EXPECT_EQ(count_blocks(entry.count, {}), (entry.count + kListBlock - 1) / kListBlock);
    }
  }
}

TEST(ListSchedule, OffsetsBeyond2To31Elements) {
  // (70000, 70000), transposed in the second operand: 4.9e9 elements.
  constexpr std::int64_t kSide = 70'000;
  const std::int64_t sizes[] = {kSide, kSide};
  const std::int64_t strides[] = {kSide, 1, 1, kSide};
  const StridedLoop loop{2, sizes, strides};
  const std::int64_t blocks = count_blocks(kSide * kSide, loop);
  EXPECT_EQ(blocks, (kSide / kStripRows) * ((kSide + kStripCols - 1) / kStripCols));
  const Strip last = strip_at(loop, blocks - 1);
  EXPECT_EQ(last.row + last.rows, kSide);
  EXPECT_EQ(last.col + last.cols, kSide);
  const StripPlace dense_place = strip_place(loop, last, 0);
  EXPECT_EQ(dense_place.offset + (last.rows - 1) * dense_place.row_stride +
                (last.cols - 1) * dense_place.col_stride,
            kSide * kSide - 1);
  const StripPlace transposed = strip_place(loop, last, 1);
  EXPECT_EQ(transposed.offset, last.col * kSide + last.row);
  EXPECT_EQ(transposed.row_stride, 1);
  EXPECT_EQ(transposed.col_stride, kSide);
  expect_complete({{.count = kSide * kSide, .loop = loop}, dense(5 * kHuge)},
                  ReversedTaskRunner(3));
}

TEST(ListSchedule, StripsCoverEachElementOnce) {
  for (const auto& sizes : std::vector<std::vector<std::int64_t>>{
           {1}, {128}, {129}, {16, 128}, {17, 129}, {3, 33, 257}, {2, 3, 5, 7}, {4, 1, 1}}) {
    std::int64_t count = 1;
    for (const std::int64_t size : sizes) count *= size;
    std::vector<std::int64_t> strides(sizes.size(), 1);
    for (std::size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * sizes[dim];
    const StridedLoop loop{static_cast<std::int32_t>(sizes.size()), sizes.data(), strides.data()};
    std::vector<int> visits(static_cast<std::size_t>(count));
    for (std::int64_t block = 0; block < count_blocks(count, loop); ++block) {
      const Strip strip = strip_at(loop, block);
      const StripPlace place = strip_place(loop, strip, 0);
      EXPECT_LE(strip.rows, kStripRows);
      EXPECT_LE(strip.cols, kStripCols);
      for (std::int64_t row = 0; row < strip.rows; ++row) {
        for (std::int64_t col = 0; col < strip.cols; ++col) {
          ++visits.at(static_cast<std::size_t>(place.offset + row * place.row_stride +
                                               col * place.col_stride));
        }
      }
    }
    EXPECT_EQ(visits, std::vector<int>(static_cast<std::size_t>(count), 1));
  }
}

TEST(RunContiguousTasks, RunsEachTaskOnce) {
  for (const std::int64_t num_tasks : {0, 1, 2, 3, 127, 128, 1001}) {
    for (const int workers : {1, 2, 3, 7, 130, 300}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(num_tasks));
      const auto count = [&](std::int64_t task) { ++runs[static_cast<std::size_t>(task)]; };
      run_contiguous_tasks(ReversedTaskRunner(workers), num_tasks, count);
      for (const std::atomic<int>& number : runs) EXPECT_EQ(number, 1);
      if (workers <= 7) {
        run_contiguous_tasks(ThreadTaskRunner(workers), num_tasks, count);
        for (const std::atomic<int>& number : runs) EXPECT_EQ(number, 2);
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext
