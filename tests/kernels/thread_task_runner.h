// A TaskRunner of plain threads that start in an order of their own: what kernels compute must not
// depend on it.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/task_runner.h"

namespace torch_ext::testing {

class ThreadTaskRunner final : public TaskRunner {
 public:
  explicit ThreadTaskRunner(int num_workers, unsigned order_seed = 1)
      : num_workers_(num_workers), order_seed_(order_seed) {}

  int num_workers() const override { return num_workers_; }

  void run(WorkerBody body) const override {
    std::vector<int> order(static_cast<std::size_t>(num_workers_));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(order_seed_));
    std::vector<std::thread> threads;
    threads.reserve(order.size());
    for (const int worker : order) threads.emplace_back([body, worker] { body(worker); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int num_workers_;
  unsigned order_seed_;
};

/// All workers on one thread, the last first: worker 0 finds nothing left to do.
class ReversedTaskRunner final : public TaskRunner {
 public:
  explicit ReversedTaskRunner(int num_workers) : num_workers_(num_workers) {}
  int num_workers() const override { return num_workers_; }
  void run(WorkerBody body) const override {
    for (int worker = num_workers_ - 1; worker >= 0; --worker) body(worker);
  }

 private:
  int num_workers_;
};

}  // namespace torch_ext::testing
