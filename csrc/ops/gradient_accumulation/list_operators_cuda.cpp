// grad_accumulate_ and grad_stats on CUDA devices.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/accumulation_kernels.h"
#include "../tensor_params.h"
#include "accumulation_operators.h"
#include "list_params.h"

namespace torch_ext {
namespace {

void grad_accumulate_cuda(at::TensorList accumulators, at::TensorList grads, double beta,
                          const OptionalTensor& scale) {
  check_accumulate(accumulators, grads, given(scale));
  const c10::cuda::CUDAGuard guard(accumulators[0].device());
  const AccumulateList list(accumulators, grads, beta, given(scale));
  C10_CUDA_CHECK(cuda::accumulate(list.params, c10::cuda::getCurrentCUDAStream()));
}

GradStatsResult grad_stats_cuda(at::TensorList grads) {
  check_grad_stats(grads);
  const c10::cuda::CUDAGuard guard(grads[0].device());
  const at::ScalarType type = norm_type(grads);
  const auto options = at::TensorOptions().device(grads[0].device()).dtype(type);
  at::Tensor norm = at::empty({}, options);
  at::Tensor norms = at::empty({static_cast<std::int64_t>(grads.size())}, options);
  at::Tensor found_inf = at::empty({}, options.dtype(at::kFloat));
  GradStatsList list(grads);
  list.params.norm_type = kernel_scalar_type(type);
  list.params.norm = norm.mutable_data_ptr();
  list.params.norms = norms.mutable_data_ptr();
  list.params.found_inf = found_inf.mutable_data_ptr<float>();
  const at::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(cuda::grad_stats_workspace(list.params));
  C10_CUDA_CHECK(cuda::grad_stats(list.params, workspace.get(), c10::cuda::getCurrentCUDAStream()));
  return {std::move(norm), std::move(norms), std::move(found_inf)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("grad_accumulate_", TORCH_FN(grad_accumulate_cuda));
  m.impl("grad_stats", TORCH_FN(grad_stats_cuda));
}

}  // namespace torch_ext
