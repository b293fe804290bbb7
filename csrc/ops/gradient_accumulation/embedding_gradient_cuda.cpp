// embedding_wgrad_ on CUDA devices.
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/accumulation_kernels.h"
#include "accumulation_operators.h"
#include "weight_gradient_views.h"

namespace torch_ext {
namespace {

void embedding_wgrad_cuda(const at::Tensor& weight_grad, const at::Tensor& indices,
                          const at::Tensor& grad_output, std::int64_t padding_idx,
                          bool scale_grad_by_freq, double beta) {
  check_embedding_gradient(weight_grad, indices, grad_output);
  if (weight_grad.numel() == 0 && indices.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(weight_grad.device());
  // Stable: a row's tokens are added in their order.
  const auto [rows, positions] = at::sort(indices.reshape({-1}).to(at::kLong), /*stable=*/true,
                                          /*dim=*/0, /*descending=*/false);
  const at::Tensor grads = flatten_tokens(grad_output);
  const cuda::SortedEmbeddingGradient params{.gradient = {.num_embeddings = weight_grad.size(0),
                                                          .dim = weight_grad.size(1),
                                                          .weight_grad = matrix(weight_grad),
                                                          .grad_output = const_matrix(grads),
                                                          .scale_by_frequency = scale_grad_by_freq,
                                                          .beta = beta},
                                             .tokens = rows.numel(),
                                             .sorted_rows = rows.const_data_ptr<std::int64_t>(),
                                             .positions = positions.const_data_ptr<std::int64_t>(),
                                             .padding_row = padding_idx};
  const at::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(cuda::embedding_gradient_workspace(params));
  C10_CUDA_CHECK(
      cuda::embedding_gradient(params, workspace.get(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("embedding_wgrad_", TORCH_FN(embedding_wgrad_cuda));
}

}  // namespace torch_ext
