// linear_wgrad_ and embedding_wgrad_ on the CPU.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../../kernels/cpu/embedding_groups.h"
#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "../tensor_params.h"
#include "accumulation_operators.h"
#include "list_entries.h"
#include "weight_gradient_views.h"

namespace torch_ext {
namespace {

constexpr const char* kEmbedding = "torch_ext::embedding_wgrad_: ";

/// Threads for so many multiplications and so many bytes of weight: waking one costs some 5 us.
std::int64_t contraction_workers(std::int64_t tokens, std::int64_t weights) {
  return 1 + (weights >> 15) + (tokens * weights >> 19);
}

void linear_wgrad_cpu(const at::Tensor& weight_grad, const OptionalTensor& bias_grad,
                      const at::Tensor& grad_output, const at::Tensor& input, double beta) {
  const at::Tensor* bias = given(bias_grad);
  check_weight_gradient({weight_grad, bias, grad_output, input});
  const at::Tensor grads = flatten_tokens(grad_output);
  const at::Tensor inputs = flatten_tokens(input);
  const WeightGradientParams params{.tokens = grads.size(0),
                                    .out_features = weight_grad.size(0),
                                    .in_features = weight_grad.size(1),
                                    .weight_grad = matrix(weight_grad),
                                    .bias_grad = operand(bias),
                                    .bias_stride = bias == nullptr ? 0 : bias->strides()[0],
                                    .grad_output = const_matrix(grads),
                                    .input = const_matrix(inputs),
                                    .beta = beta};
  const KernelTable& table = kernel_table();
  const AtenTaskRunner runner(contraction_workers(params.tokens, weight_grad.numel()));
  const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(
      table.weight_gradient_workspace(params, runner.num_workers()));
  table.weight_gradient(params, runner, workspace.get());
}

template <typename Index>
EmbeddingGroups groups_of(const at::Tensor& indices, std::int64_t num_embeddings,
                          std::int64_t padding_idx) {
  const Index* data = indices.const_data_ptr<Index>();
  const auto wrong = find_index_out_of_range(data, indices.numel(), num_embeddings);
  if (wrong.has_value()) {
    TORCH_CHECK_INDEX(num_embeddings > 0, kEmbedding,
                      "indices takes rows of weight_grad, of which there are none, got ", *wrong);
    TORCH_CHECK_INDEX(false, kEmbedding, "indices takes rows of weight_grad, 0 to ",
                      num_embeddings - 1, ", got ", *wrong);
  }
  return group_by_row(data, indices.numel(), num_embeddings, padding_idx);
}

void embedding_wgrad_cpu(const at::Tensor& weight_grad, const at::Tensor& indices,
                         const at::Tensor& grad_output, std::int64_t padding_idx,
                         bool scale_grad_by_freq, double beta) {
  check_embedding_gradient(weight_grad, indices, grad_output);
  const at::Tensor flat_indices = indices.contiguous();
  const std::int64_t num_embeddings = weight_grad.size(0);
  const EmbeddingGroups groups =
      indices.scalar_type() == at::kLong
          ? groups_of<std::int64_t>(flat_indices, num_embeddings, padding_idx)
          : groups_of<std::int32_t>(flat_indices, num_embeddings, padding_idx);
  const at::Tensor grads = flatten_tokens(grad_output);
  const EmbeddingGradientParams params{.num_embeddings = num_embeddings,
                                       .dim = weight_grad.size(1),
                                       .weight_grad = matrix(weight_grad),
                                       .grad_output = const_matrix(grads),
                                       .num_rows = static_cast<std::int64_t>(groups.rows.size()),
                                       .rows = groups.rows.data(),
                                       .starts = groups.starts.data(),
                                       .positions = groups.positions.data(),
                                       .scale_by_frequency = scale_grad_by_freq,
                                       .beta = beta};
  const std::int64_t elements = grads.numel() + (beta == 1.0 ? 0 : weight_grad.numel());
  kernel_table().embedding_gradient(params, AtenTaskRunner(list_workers(elements)));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("linear_wgrad_", TORCH_FN(linear_wgrad_cpu));
  m.impl("embedding_wgrad_", TORCH_FN(embedding_wgrad_cpu));
}

}  // namespace torch_ext
