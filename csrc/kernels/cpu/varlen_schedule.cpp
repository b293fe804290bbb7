#include "varlen_schedule.h"

#include <algorithm>
#include <numeric>

#include "../attention_extent.h"

namespace torch_ext {
namespace {

// A task costs a microsecond to plan. 2^16 scores of 64 columns cost some hundred.
constexpr std::int64_t kScoresPerTask = 1 << 16;

std::int64_t visible_keys(const KeyWindow& window, std::int64_t query, std::int64_t kv_len) {
  return keys_of(window, query, kv_len).size();
}

// Scores that one head of a sequence has, by Simpson's rule: exact where the number of visible keys
// is linear in the query.
std::int64_t scores_of(const AttentionShape& shape, const KeyWindow& window) {
  if (shape.q_len == 0) return 0;
  const std::int64_t last = shape.q_len - 1;
  return shape.q_len *
         (visible_keys(window, 0, shape.kv_len) + 4 * visible_keys(window, last / 2, shape.kv_len) +
          visible_keys(window, last, shape.kv_len)) /
         6;
}

// The most work first; equal ones in their order.
std::vector<std::int64_t> by_work(const std::vector<std::int64_t>& work) {
  std::vector<std::int64_t> order(work.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&work](std::int64_t a, std::int64_t b) {
    return work[static_cast<std::size_t>(a)] > work[static_cast<std::size_t>(b)];
  });
  return order;
}

template <typename Params>
std::vector<std::int64_t> work_of(const Params& call, const VarlenSequences& sequences) {
  std::vector<std::int64_t> work(static_cast<std::size_t>(sequences.calls(call.shape)));
  for (std::int64_t index = 0; index < sequences.calls(call.shape); ++index) {
    const Params params = sequence_params(call, sequences, index);
    work[static_cast<std::size_t>(index)] = scores_of(params.shape, params.transform.window);
  }
  return work;
}

// `units`: of a sequence that has `scores` scores a head.
std::int64_t units_per_task(std::int64_t units, std::int64_t heads, std::int64_t scores) {
  const std::int64_t scores_per_unit =
      std::max<std::int64_t>(scores * heads / std::max<std::int64_t>(units, 1), 1);
  return std::max<std::int64_t>(kScoresPerTask / scores_per_unit, 1);
}

// Rows of the join at the end: none where a sequence's keys come in one part.
std::int64_t join_units(const AttentionForwardParams&, const ForwardPlan& plan) {
  return plan.join_units();
}
std::int64_t join_units(const AttentionBackwardParams& params, const BackwardPlan& plan) {
  return plan.join_units(params);
}

template <typename Params, typename MakePlan>
VarlenSchedule schedule(const Params& call, const VarlenSequences& sequences, int num_workers,
                        const MakePlan& make_plan) {
  VarlenSchedule result;
  const std::vector<std::int64_t> work = work_of(call, sequences);
  result.order = by_work(work);
  for (const std::int64_t index : result.order) {
    const Params params = sequence_params(call, sequences, index);
    const auto plan = make_plan(params);
    result.areas.push_back(result.worker_offset);
    result.worker_offset += plan.worker_offset;
    result.worker_bytes = std::max(result.worker_bytes, plan.worker_bytes);
    const std::int64_t units = plan.units();
    result.tasks.add(units, units_per_task(units, params.shape.query_heads,
                                           work[static_cast<std::size_t>(index)]));
    constexpr std::int64_t kJoinsPerTask = 64;
    result.joins.add(join_units(params, plan), kJoinsPerTask);
  }
  result.total_bytes = result.worker_offset + result.worker_bytes * num_workers;
  return result;
}

}  // namespace

void VarlenTasks::add(std::int64_t units, std::int64_t units_per_task) {
  ends_.push_back(size() + (units + units_per_task - 1) / units_per_task);
  units_.push_back(units);
  units_per_task_.push_back(units_per_task);
}

VarlenTasks::Task VarlenTasks::find(std::int64_t task) const {
  const auto position = std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin();
  const auto i = static_cast<std::size_t>(position);
  const std::int64_t first = i == 0 ? 0 : ends_[i - 1];
  const std::int64_t begin = (task - first) * units_per_task_[i];
  return {position, begin, std::min(begin + units_per_task_[i], units_[i])};
}

VarlenSchedule schedule_varlen(const AttentionForwardParams& call, const VarlenSequences& sequences,
                               const TileGeometry& geometry, int num_workers) {
  return schedule(call, sequences, num_workers, [&geometry](const AttentionForwardParams& params) {
    return plan_forward(params, geometry, /*num_workers=*/1);
  });
}

VarlenSchedule schedule_varlen(const AttentionBackwardParams& call,
                               const VarlenSequences& sequences, const TileGeometry& geometry,
                               int num_workers) {
  return schedule(call, sequences, num_workers, [&geometry](const AttentionBackwardParams& params) {
    return plan_backward(params, geometry, /*num_workers=*/1);
  });
}

}  // namespace torch_ext
