// torch_ext::attention_backward on the CPU.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "../tensor_params.h"
#include "attention_call.h"
#include "attention_cpu.h"
#include "attention_path.h"
#include "attention_signature.h"

namespace torch_ext {
namespace {

StridedView wanted_view(const at::Tensor& tensor) {
  return tensor.defined() ? mutable_strided_view(tensor) : StridedView{};
}

}  // namespace

void run_attention_backward_cpu(const AttentionArguments& arguments,
                                const AttentionGradients& gradients,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const AttentionGradientOutputs& outputs) {
  if (has_no_scores(geometry)) {
    write_no_score_gradients(gradients, geometry, outputs);
    return record_attention_path("cpu.empty");
  }
  // The kernels read these two as the forward pass writes them: contiguous.
  const c10::MaybeOwned<at::Tensor> logsumexp = gradients.logsumexp->expect_contiguous();
  at::Tensor grad_logsumexp;
  if (gradients.grad_logsumexp != nullptr) {
    grad_logsumexp = gradients.grad_logsumexp->to(logsumexp->scalar_type()).contiguous();
  }
  const at::ScalarType type = arguments.query->scalar_type();
  const auto grad_out = gradients.grad_out->scalar_type() == type
                            ? c10::MaybeOwned<at::Tensor>::borrowed(*gradients.grad_out)
                            : c10::MaybeOwned<at::Tensor>::owned(gradients.grad_out->to(type));
  const at::Tensor sink = kernel_sink(arguments);
  const AttentionBackwardParams params{
      .dtype = kernel_scalar_type(arguments.query->scalar_type()),
      .shape = attention_shape(geometry),
      .query = strided_view(*arguments.query),
      .key = strided_view(*arguments.key),
      .value = strided_view(*arguments.value),
      .out = strided_view(*gradients.out),
      .grad_out = strided_view(*grad_out),
      .logsumexp = logsumexp->const_data_ptr(),
      .grad_logsumexp =
          gradients.grad_logsumexp == nullptr ? nullptr : grad_logsumexp.const_data_ptr(),
      .unrounded_grads = outputs.unrounded(arguments.query->scalar_type()),
      .grad_query = wanted_view(outputs.query),
      .grad_key = wanted_view(outputs.key),
      .grad_value = wanted_view(outputs.value),
      .grad_mask = wanted_view(outputs.mask),
      .grad_sink = outputs.sink.defined() ? outputs.sink.mutable_data_ptr() : nullptr,
      .transform = score_transform(arguments, geometry, sink),
      .dropout = attention_dropout(arguments)};
  const KernelTable& table = kernel_table();
  const AtenTaskRunner runner(2 * attention_workers(geometry));
  const std::size_t bytes = table.attention_backward_workspace(params, runner.num_workers());
  const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(bytes);  // 64-byte aligned
  record_attention_path(table.attention_backward(params, runner, workspace.get()));
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("attention_backward", TORCH_FN(attention_backward_kernel<CpuAttention>));
}

}  // namespace torch_ext
