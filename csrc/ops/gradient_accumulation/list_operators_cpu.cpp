// grad_accumulate_ and grad_stats on the CPU.
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <vector>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "../tensor_params.h"
#include "accumulation_operators.h"
#include "list_entries.h"

namespace torch_ext {
namespace {

void grad_accumulate_cpu(at::TensorList accumulators, at::TensorList grads, double beta,
                         const OptionalTensor& scale) {
  check_accumulate(accumulators, grads, given(scale));
  LoopArena arena;
  std::vector<AccumulateEntry> entries(accumulators.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const at::Tensor& accumulator = accumulators[i];
    entries[i] = {.count = accumulator.numel(),
                  .accumulator = operand(accumulator),
                  .grad = const_operand(grads[i]),
                  .loop = arena.loop_of({&accumulator, &grads[i]})};
    elements += entries[i].count;
  }
  const AccumulateParams params{.entries = entries.data(),
                                .num_entries = static_cast<std::int64_t>(entries.size()),
                                .beta = beta,
                                .scale = const_operand(given(scale))};
  kernel_table().accumulate(params, AtenTaskRunner(list_workers(elements)));
}

GradStatsResult grad_stats_cpu(at::TensorList grads) {
  check_grad_stats(grads);
  const at::ScalarType type = norm_type(grads);
  const auto options = at::TensorOptions().device(at::kCPU).dtype(type);
  at::Tensor norm = at::empty({}, options);
  at::Tensor norms = at::empty({static_cast<std::int64_t>(grads.size())}, options);
  at::Tensor found_inf = at::empty({}, options.dtype(at::kFloat));
  LoopArena arena;
  std::vector<GradStatsEntry> entries(grads.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    entries[i] = {.count = grads[i].numel(),
                  .grad = const_operand(grads[i]),
                  .loop = arena.loop_of({&grads[i]})};
    elements += entries[i].count;
  }
  const GradStatsParams params{.entries = entries.data(),
                               .num_entries = static_cast<std::int64_t>(entries.size()),
                               .norm_type = kernel_scalar_type(type),
                               .norm = norm.mutable_data_ptr(),
                               .norms = norms.mutable_data_ptr(),
                               .found_inf = found_inf.mutable_data_ptr<float>()};
  const KernelTable& table = kernel_table();
  const at::DataPtr workspace =
      c10::GetCPUAllocator()->allocate(table.grad_stats_workspace(params));
  table.grad_stats(params, AtenTaskRunner(list_workers(elements)), workspace.get());
  return {std::move(norm), std::move(norms), std::move(found_inf)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("grad_accumulate_", TORCH_FN(grad_accumulate_cpu));
  m.impl("grad_stats", TORCH_FN(grad_stats_cpu));
}

}  // namespace torch_ext
