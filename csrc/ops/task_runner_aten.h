// torch's own thread pool as the kernels' parallel loop.
#pragma once

#include "../kernels/cpu/task_runner.h"

namespace torch_ext {

/// As many workers as at::parallel_for would use here: at::get_num_threads(), or one inside a
/// parallel region.
class AtenTaskRunner final : public TaskRunner {
 public:
  AtenTaskRunner();
  /// At most `max_workers`, for calls too small to be worth waking a thread for each worker.
  explicit AtenTaskRunner(std::int64_t max_workers);

  int num_workers() const override { return num_workers_; }
  void run(WorkerBody body) const override;

 private:
  int num_workers_;
};

}  // namespace torch_ext
