// The CUDA programs of the mini-batch operators as one more column of kernels: what is arithmetic
// in them, on indices and on numbers, passes the tests of the others on machines without a GPU.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "host_launcher.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cuda/accumulate_program.h"
#include "kernels/cuda/embedding_gradient_launch.h"
#include "kernels/cuda/gradient_norm_launch.h"
#include "kernels/cuda/optimizer_step_launch.h"

namespace torch_ext::testing {

extern const KernelTable kEmulatedCudaKernels;

namespace {

void accumulate(const AccumulateParams& params, const TaskRunner& runner) {
  cuda::launch_accumulate(HostLauncher{runner}, params);
}

std::size_t grad_stats_workspace(const GradStatsParams& params) {
  return cuda::norm_workspace(params);
}

void grad_stats(const GradStatsParams& params, const TaskRunner& runner, void* workspace) {
  cuda::launch_norms(HostLauncher{runner}, params, workspace);
}

void adam_step(const AdamParams& params, const TaskRunner& runner) {
  std::vector<unsigned char> workspace(cuda::adam_workspace(params));
  cuda::launch_adam_step(HostLauncher{runner}, params, workspace.data());
}

void sgd_step(const SgdParams& params, const TaskRunner& runner) {
  cuda::launch_sgd_step(HostLauncher{runner}, params);
}

/// The device gets its tokens sorted by row, not grouped.
void embedding_gradient(const EmbeddingGradientParams& params, const TaskRunner& runner) {
  cuda::SortedEmbeddingGradient sorted{.gradient = params};
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < params.num_rows; ++i) {
    rows.insert(rows.end(), static_cast<std::size_t>(params.starts[i + 1] - params.starts[i]),
                params.rows[i]);
  }
  sorted.tokens = static_cast<std::int64_t>(rows.size());
  sorted.sorted_rows = rows.data();
  sorted.positions = params.positions;
  std::vector<unsigned char> workspace(cuda::embedding_workspace(sorted));
  cuda::launch_embedding_gradient(HostLauncher{runner}, sorted, workspace.data());
}

}  // namespace

constinit const KernelTable kEmulatedCudaKernels{
    .capability = CpuCapability::kDefault,
    .attention_forward_workspace = nullptr,
    .attention_forward = nullptr,
    .attention_backward_workspace = nullptr,
    .attention_backward = nullptr,
    .accumulate = accumulate,
    .grad_stats_workspace = grad_stats_workspace,
    .grad_stats = grad_stats,
    .adam_step = adam_step,
    .sgd_step = sgd_step,
    .weight_gradient_workspace = nullptr,
    .weight_gradient = nullptr,
    .embedding_gradient = embedding_gradient,
};

}  // namespace torch_ext::testing
