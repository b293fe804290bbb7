#include "list_schedule.h"

#include <algorithm>

namespace torch_ext {
namespace {

// A task is worth handing out from here on: some 30 us of memory traffic.
constexpr std::int64_t kMinTaskWeight = 64 * 1024;
// Tasks per worker in a large list, so that a worker that was interrupted does not hold up the
// rest.
constexpr std::int64_t kTasksPerWorker = 32;
// An entry's own cost, in elements.
constexpr std::int64_t kEntryCost = 128;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t loop_rows(const StridedLoop& loop) {
  return loop.dims >= 2 ? loop.sizes[loop.dims - 2] : 1;
}

std::int64_t loop_cols(const StridedLoop& loop) { return loop.sizes[loop.dims - 1]; }

}  // namespace

std::int64_t count_blocks(std::int64_t count, const StridedLoop& loop) {
  if (count == 0) return 0;
  if (loop.dims == 0) return ceil_div(count, kListBlock);
  const std::int64_t rows = loop_rows(loop);
  const std::int64_t cols = loop_cols(loop);
  return count / (rows * cols) * ceil_div(rows, kStripRows) * ceil_div(cols, kStripCols);
}

Strip strip_at(const StridedLoop& loop, std::int64_t block) {
  const std::int64_t rows = loop_rows(loop);
  const std::int64_t cols = loop_cols(loop);
  const std::int64_t col_blocks = ceil_div(cols, kStripCols);
  const std::int64_t row_blocks = ceil_div(rows, kStripRows);
  Strip strip;
  strip.col = block % col_blocks * kStripCols;
  strip.row = block / col_blocks % row_blocks * kStripRows;
  strip.outer = block / col_blocks / row_blocks;
  strip.cols = std::min(kStripCols, cols - strip.col);
  strip.rows = std::min(kStripRows, rows - strip.row);
  return strip;
}

StripPlace strip_place(const StridedLoop& loop, const Strip& strip, int operand) {
  const std::int64_t* strides = loop.strides + static_cast<std::int64_t>(operand) * loop.dims;
  StripPlace place{0, 0, strides[loop.dims - 1]};
  place.offset = strip.col * place.col_stride;
  if (loop.dims < 2) return place;
  place.row_stride = strides[loop.dims - 2];
  place.offset += strip.row * place.row_stride;
  std::int64_t outer = strip.outer;
  for (int dim = loop.dims - 3; dim >= 0; --dim) {
    place.offset += outer % loop.sizes[dim] * strides[dim];
    outer /= loop.sizes[dim];
  }
  return place;
}

template <typename Entry>
ListSchedule::ListSchedule(const Entry* entries, std::int64_t num_entries, int num_workers) {
  std::int64_t weight = 0;
  for (std::int64_t i = 0; i < num_entries; ++i) weight += kEntryCost + entries[i].count;
  // A list that is worth a few tasks only is cut evenly.
  task_weight_ =
      weight < 4 * kMinTaskWeight
          ? std::max(kMinTaskWeight / 4, ceil_div(weight, 4))
          : std::max(kMinTaskWeight, weight / (std::max(num_workers, 1) * kTasksPerWorker));
  push({0, 0});
  for (std::int64_t i = 0; i < num_entries; ++i) add(i, entries[i].count, entries[i].loop);
  if (tasks_[num_tasks_].entry < num_entries) push({num_entries, 0});
}

template ListSchedule::ListSchedule(const AccumulateEntry*, std::int64_t, int);
template ListSchedule::ListSchedule(const GradStatsEntry*, std::int64_t, int);
template ListSchedule::ListSchedule(const AdamEntry*, std::int64_t, int);
template ListSchedule::ListSchedule(const SgdEntry*, std::int64_t, int);

ListSchedule::~ListSchedule() { delete[] tasks_; }

void ListSchedule::push(ListPosition position) {
  if (num_tasks_ + 1 == capacity_) {
    const std::int64_t capacity = std::max<std::int64_t>(64, 2 * capacity_);
    ListPosition* const grown = new ListPosition[static_cast<std::size_t>(capacity)];
    std::copy(tasks_, tasks_ + capacity_, grown);
    delete[] tasks_;
    tasks_ = grown;
    capacity_ = capacity;
  }
  tasks_[++num_tasks_] = position;
}

void ListSchedule::add(std::int64_t entry, std::int64_t count, const StridedLoop& loop) {
  open_weight_ += kEntryCost;
  if (open_weight_ + count < task_weight_) {
    open_weight_ += count;
    return;
  }
  const std::int64_t blocks = count_blocks(count, loop);
  if (blocks == 0) return;
  const std::int64_t block_weight = std::max<std::int64_t>(1, count / blocks);
  std::int64_t block = 0;
  while (block < blocks) {
    const std::int64_t room =
        std::max<std::int64_t>(1, (task_weight_ - open_weight_) / block_weight);
    if (block + room > blocks) {
      open_weight_ += (blocks - block) * block_weight;
      return;
    }
    block += room;
    push(block == blocks ? ListPosition{entry + 1, 0} : ListPosition{entry, block});
    open_weight_ = 0;
  }
}

}  // namespace torch_ext
