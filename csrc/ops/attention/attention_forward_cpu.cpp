// torch_ext::attention_forward on the CPU.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "attention_call.h"
#include "attention_cpu.h"
#include "attention_path.h"
#include "attention_signature.h"

namespace torch_ext {

std::int64_t attention_workers(const AttentionGeometry<std::int64_t>& geometry) {
  // Waking a thread costs a few microseconds: about as long as one core takes for 2^19 operations.
  constexpr double kOperationsPerWorker = 1 << 19;
  const double operations =
      2.0 * static_cast<double>(attention_shape(geometry).batch() * geometry.query_heads) *
      static_cast<double>(geometry.q_len) * static_cast<double>(geometry.kv_len) *
      static_cast<double>(geometry.head_dim + geometry.value_dim);
  return 1 + static_cast<std::int64_t>(operations / kOperationsPerWorker);
}

void run_attention_forward_cpu(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& out, const at::Tensor* logsumexp) {
  if (has_no_scores(geometry)) {
    write_no_scores(arguments, out, logsumexp);
    return record_attention_path("cpu.empty");
  }
  const at::Tensor sink = kernel_sink(arguments);
  const AttentionForwardParams params = forward_params(arguments, geometry, sink, out, logsumexp);
  const KernelTable& table = kernel_table();
  const AtenTaskRunner runner(attention_workers(geometry));
  const std::size_t bytes = table.attention_forward_workspace(params, runner.num_workers());
  const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(bytes);  // 64-byte aligned
  record_attention_path(table.attention_forward(params, runner, workspace.get()));
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<CpuAttention>));
}

}  // namespace torch_ext
