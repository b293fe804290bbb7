// grad_accumulate_ and grad_stats on the CPU.
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "../tensor_params.h"
#include "accumulation_operators.h"
#include "list_entries.h"
#include "list_params.h"

namespace torch_ext {
namespace {

void grad_accumulate_cpu(at::TensorList accumulators, at::TensorList grads, double beta,
                         const OptionalTensor& scale) {
  check_accumulate(accumulators, grads, given(scale));
  const AccumulateList list(accumulators, grads, beta, given(scale));
  kernel_table().accumulate(list.params, AtenTaskRunner(list_workers(list.elements)));
}

GradStatsResult grad_stats_cpu(at::TensorList grads) {
  check_grad_stats(grads);
  const at::ScalarType type = norm_type(grads);
  const auto options = at::TensorOptions().device(at::kCPU).dtype(type);
  at::Tensor norm = at::empty({}, options);
  at::Tensor norms = at::empty({static_cast<std::int64_t>(grads.size())}, options);
  at::Tensor found_inf = at::empty({}, options.dtype(at::kFloat));
  GradStatsList list(grads);
  list.params.norm_type = kernel_scalar_type(type);
  list.params.norm = norm.mutable_data_ptr();
  list.params.norms = norms.mutable_data_ptr();
  list.params.found_inf = found_inf.mutable_data_ptr<float>();
  const KernelTable& table = kernel_table();
  const at::DataPtr workspace =
      c10::GetCPUAllocator()->allocate(table.grad_stats_workspace(list.params));
  table.grad_stats(list.params, AtenTaskRunner(list_workers(list.elements)), workspace.get());
  return {std::move(norm), std::move(norms), std::move(found_inf)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("grad_accumulate_", TORCH_FN(grad_accumulate_cpu));
  m.impl("grad_stats", TORCH_FN(grad_stats_cpu));
}

}  // namespace torch_ext
