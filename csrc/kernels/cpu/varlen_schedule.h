// How the sequences of one varlen call become one list of tasks. Each sequence is planned by its
// own lengths alone: it gets the same bits alone and in any batch. The sequences with the most work
// come first, and small ones are one task for all their heads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../varlen_sequences.h"
#include "attention_schedule.h"

namespace torch_ext {

/// Units of work of many sequences as one list of tasks, each a range of one sequence's units.
class VarlenTasks {
 public:
  struct Task {
    std::int64_t position;  // of the sequence, in the schedule's order
    std::int64_t begin;     // units
    std::int64_t end;
  };

  /// The next position has `units` units, of which `units_per_task` make a task.
  void add(std::int64_t units, std::int64_t units_per_task);
  std::int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }
  Task find(std::int64_t task) const;

 private:
  std::vector<std::int64_t> ends_;   // of each position's tasks
  std::vector<std::int64_t> units_;  // of each position
  std::vector<std::int64_t> units_per_task_;
};

/// Of either pass. The workspace begins with an area of each sequence and ends with the workers'
/// private memory.
struct VarlenSchedule {
  std::vector<std::int64_t> order;  // indices of sequences, the most work first
  std::vector<std::size_t> areas;   // bytes into the workspace, by position
  std::size_t worker_offset = 0;
  std::size_t worker_bytes = 0;
  std::size_t total_bytes = 0;
  VarlenTasks tasks;
  VarlenTasks joins;  // units: rows of all heads of a sequence whose keys come in several parts

  /// A sequence's plan with the workers' memory where this schedule has it, counted from `area`.
  template <typename Plan>
  Plan placed(Plan plan, std::int64_t position) const {
    plan.worker_offset = worker_offset - areas[static_cast<std::size_t>(position)];
    plan.worker_bytes = worker_bytes;
    return plan;
  }
};

VarlenSchedule schedule_varlen(const AttentionForwardParams& call, const VarlenSequences& sequences,
                               const TileGeometry& geometry, int num_workers);
VarlenSchedule schedule_varlen(const AttentionBackwardParams& call,
                               const VarlenSequences& sequences, const TileGeometry& geometry,
                               int num_workers);

}  // namespace torch_ext
