#include "task_runner_aten.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

namespace torch_ext {

AtenTaskRunner::AtenTaskRunner() : AtenTaskRunner(std::numeric_limits<std::int64_t>::max()) {}

AtenTaskRunner::AtenTaskRunner(std::int64_t max_workers)
    : num_workers_(at::in_parallel_region() ? 1
                                            : static_cast<int>(std::clamp<std::int64_t>(
                                                  max_workers, 1, at::get_num_threads()))) {}

void AtenTaskRunner::run(WorkerBody body) const {
  if (num_workers_ == 1) return body(0);
  at::parallel_for(0, num_workers_, 1, [&body](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker) body(static_cast<int>(worker));
  });
}

}  // namespace torch_ext
