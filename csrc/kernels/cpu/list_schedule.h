// A list of tensors as one row of equal pieces of work: what a single parallel region hands out,
// balanced over elements, whatever the tensors' sizes.
#pragma once

#include <atomic>
#include <cstdint>

#include "../accumulation_params.h"
#include "task_runner.h"

namespace torch_ext {

/// Elements of a block of a dense entry. What a reduction adds up first, so part of its result's
/// definition: a block must not depend on the number of workers.
inline constexpr std::int64_t kListBlock = 8192;

/// Blocks of an entry that needs a StridedLoop: strips of at most kStripRows x kStripCols of its
/// two innermost dimensions. Two buffers of doubles fit the first-level cache.
inline constexpr std::int64_t kStripRows = 16;
inline constexpr std::int64_t kStripCols = 128;

/// Number of blocks of an entry.
std::int64_t count_blocks(std::int64_t count, const StridedLoop& loop);

/// Where one strip lies.
struct Strip {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row = 0;  // first of each, in the two innermost dimensions
  std::int64_t col = 0;
  std::int64_t outer = 0;  // flattened index of the other dimensions
};

Strip strip_at(const StridedLoop& loop, std::int64_t block);

/// Element offset of the strip's first element in operand `operand`, and its two strides.
struct StripPlace {
  std::int64_t offset;
  std::int64_t row_stride;
  std::int64_t col_stride;
};

StripPlace strip_place(const StridedLoop& loop, const Strip& strip, int operand);

/// The first block of a task; the task ends where the next one begins.
struct ListPosition {
  std::int64_t entry;
  std::int64_t block;
};

class ListSchedule {
 public:
  /// Cuts the blocks of a list into tasks. `num_workers` shapes the tasks, never the blocks.
  /// Instantiated in the .cpp for each kind of entry: an instruction set's file, which includes
  /// this, must not emit std code of its own.
  template <typename Entry>
  ListSchedule(const Entry* entries, std::int64_t num_entries, int num_workers);
  ~ListSchedule();
  ListSchedule(const ListSchedule&) = delete;
  ListSchedule& operator=(const ListSchedule&) = delete;

  std::int64_t num_tasks() const { return num_tasks_; }
  ListPosition task_begin(std::int64_t task) const { return tasks_[task]; }
  ListPosition task_end(std::int64_t task) const { return tasks_[task + 1]; }

 private:
  void add(std::int64_t entry, std::int64_t count, const StridedLoop& loop);
  void push(ListPosition position);

  std::int64_t task_weight_ = 1;
  std::int64_t open_weight_ = 0;
  std::int64_t num_tasks_ = -1;
  std::int64_t capacity_ = 0;
  ListPosition* tasks_ = nullptr;
};

/// As run_tasks(), but each worker starts in a contiguous range of its own, so that the memory it
/// touches lies together, and then takes over what others have left.
template <typename Task>
void run_contiguous_tasks(const TaskRunner& runner, std::int64_t num_tasks, const Task& task) {
  constexpr int kMaxRanges = 128;
  if (num_tasks <= 0) return;
  const int num_workers = runner.num_workers();
  if (num_tasks == 1 || num_workers == 1) {
    for (std::int64_t index = 0; index < num_tasks; ++index) task(index);
    return;
  }
  struct alignas(64) Range {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };
  Range ranges[kMaxRanges];
  const int num_ranges = num_workers < kMaxRanges ? num_workers : kMaxRanges;
  for (int i = 0; i < num_ranges; ++i) {
    ranges[i].next.store(num_tasks * i / num_ranges, std::memory_order_relaxed);
    ranges[i].end = num_tasks * (i + 1) / num_ranges;
  }
  runner.run([&](int worker) {
    for (int i = 0; i < num_ranges; ++i) {
      Range& range = ranges[(worker + i) % num_ranges];
      for (;;) {
        const std::int64_t index = range.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= range.end) break;
        task(index);
      }
    }
  });
}

/// Calls `body(entry, first_block, end_block)` for each piece of the list.
template <typename Entry, typename Body>
void run_list(const TaskRunner& runner, const Entry* entries, std::int64_t num_entries,
              const Body& body) {
  const ListSchedule schedule(entries, num_entries, runner.num_workers());
  run_contiguous_tasks(runner, schedule.num_tasks(), [&](std::int64_t task) {
    ListPosition at = schedule.task_begin(task);
    const ListPosition end = schedule.task_end(task);
    while (at.entry < end.entry) {
      const std::int64_t blocks = count_blocks(entries[at.entry].count, entries[at.entry].loop);
      if (at.block < blocks) body(at.entry, at.block, blocks);
      ++at.entry;
      at.block = 0;
    }
    if (at.block < end.block) body(at.entry, at.block, end.block);
  });
}

}  // namespace torch_ext
