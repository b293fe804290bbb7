#include "kernels/cpu/task_runner.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "thread_task_runner.h"

namespace torch_ext {
namespace {

using testing::ReversedTaskRunner;
using testing::ThreadTaskRunner;

void expect_each_task_once(const TaskRunner& runner, std::int64_t num_tasks) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(num_tasks));
  std::atomic<bool> worker_in_range{true};
  run_tasks(runner, num_tasks, [&](int worker, std::int64_t task) {
    if (worker < 0 || worker >= runner.num_workers()) worker_in_range = false;
    ++runs[static_cast<std::size_t>(task)];
  });
  EXPECT_TRUE(worker_in_range);
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    EXPECT_EQ(runs[static_cast<std::size_t>(task)], 1) << task << " of " << num_tasks;
  }
}

TEST(RunTasks, RunsEachTaskOnce) {
  for (const std::int64_t num_tasks : {0, 1, 2, 3, 100, 1001}) {
    expect_each_task_once(SerialTaskRunner(), num_tasks);
    for (const int workers : {1, 2, 3, 8}) {
      expect_each_task_once(ThreadTaskRunner(workers), num_tasks);
      expect_each_task_once(ReversedTaskRunner(workers), num_tasks);
    }
  }
}

TEST(RunTasks, HandsOutTasksInIncreasingOrder) {
  const ThreadTaskRunner runner(3);
  std::vector<std::vector<std::int64_t>> seen(3);
  run_tasks(runner, 500, [&](int worker, std::int64_t task) { seen[worker].push_back(task); });
  for (const std::vector<std::int64_t>& tasks : seen) {
    for (std::size_t i = 1; i < tasks.size(); ++i) EXPECT_LT(tasks[i - 1], tasks[i]);
  }
}

TEST(RunTasks, WorkersAreExclusive) {
  const ThreadTaskRunner runner(4);
  std::vector<std::atomic<int>> inside(4);
  std::atomic<bool> exclusive{true};
  run_tasks(runner, 1000, [&](int worker, std::int64_t) {
    if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) exclusive = false;
    inside[static_cast<std::size_t>(worker)].fetch_sub(1);
  });
  EXPECT_TRUE(exclusive);
}

TEST(RunTasks, OneTaskStaysOnTheCallingThread) {
  const ThreadTaskRunner runner(4);
  const std::thread::id caller = std::this_thread::get_id();
  run_tasks(runner, 1, [&](int worker, std::int64_t) {
    EXPECT_EQ(worker, 0);
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST(WorkerBody, CallsWhatItRefersTo) {
  std::vector<int> workers;
  const auto body = [&](int worker) { workers.push_back(worker); };
  const WorkerBody reference(body);
  reference(3);
  reference(0);
  EXPECT_EQ(workers, (std::vector<int>{3, 0}));
}

}  // namespace
}  // namespace torch_ext
