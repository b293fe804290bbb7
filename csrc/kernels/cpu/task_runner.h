// The parallel loop that kernels are given. csrc/ops adapts at::parallel_for to it; tests bring
// plain threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace torch_ext {

/// A non-owning reference to a callable taking an int.
class WorkerBody {
 public:
  template <typename Callable>
  WorkerBody(const Callable& callable)  // NOLINT: implicit, as std::function is
      : object_(&callable), call_([](const void* object, int worker) {
          (*static_cast<const Callable*>(object))(worker);
        }) {}
  void operator()(int worker) const { call_(object_, worker); }

 private:
  const void* object_;
  void (*call_)(const void*, int);
};

class TaskRunner {
 public:
  virtual ~TaskRunner() = default;
  /// Upper bound of concurrent workers: sizes the per-worker workspace. At least 1.
  virtual int num_workers() const = 0;
  /// Calls body(worker) once for each worker in [0, num_workers), concurrently or one after the
  /// other, and returns when all are done.
  virtual void run(WorkerBody body) const = 0;
};

/// The runner of a single thread.
class SerialTaskRunner final : public TaskRunner {
 public:
  int num_workers() const override { return 1; }
  void run(WorkerBody body) const override { body(0); }
};

/// Workers pull task indices in increasing order, so a list that is sorted longest first balances
/// itself. Which worker runs a task must not influence its result.
template <typename Task>
void run_tasks(const TaskRunner& runner, std::int64_t num_tasks, const Task& task) {
  if (num_tasks <= 0) return;
  if (num_tasks == 1 || runner.num_workers() == 1) {
    for (std::int64_t index = 0; index < num_tasks; ++index) task(0, index);
    return;
  }
  std::atomic<std::int64_t> next{0};
  runner.run([&](int worker) {
    for (;;) {
      const std::int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_tasks) return;
      task(worker, index);
    }
  });
}

}  // namespace torch_ext
