// torch_ext::attention_backward on CUDA devices.
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/attention_kernels.h"
#include "../cuda_float32_precision.h"
#include "../tensor_params.h"
#include "attention_call.h"
#include "attention_cuda.h"
#include "attention_path.h"
#include "attention_signature.h"

namespace torch_ext {
namespace {

StridedView wanted_view(const at::Tensor& tensor) {
  return tensor.defined() ? mutable_strided_view(tensor) : StridedView{};
}

std::size_t shared_memory_limit(c10::DeviceIndex device) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<std::size_t>(bytes);
}

}  // namespace

void run_attention_backward_cuda(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients,
                                 const AttentionGeometry<std::int64_t>& geometry,
                                 const AttentionGradientOutputs& outputs) {
  check_cuda_options(arguments);
  const c10::cuda::CUDAGuard guard(arguments.query->device());
  if (has_no_scores(geometry)) {
    write_no_score_gradients(gradients, geometry, outputs);
    return record_attention_path("cuda.empty");
  }
  // The kernels read these two as the forward pass writes them: contiguous.
  const c10::MaybeOwned<at::Tensor> logsumexp = gradients.logsumexp->expect_contiguous();
  at::Tensor grad_logsumexp;
  if (gradients.grad_logsumexp != nullptr) {
    grad_logsumexp = gradients.grad_logsumexp->to(logsumexp->scalar_type()).contiguous();
  }
  const bool allow_tf32 = allows_tf32();
  const at::Tensor query = with_unit_columns(*arguments.query, allow_tf32);
  const at::Tensor key = with_unit_columns(*arguments.key, allow_tf32);
  const at::Tensor value = with_unit_columns(*arguments.value, allow_tf32);
  const at::Tensor out = with_unit_columns(*gradients.out, allow_tf32);
  const at::Tensor grad_out =
      with_unit_columns(gradients.grad_out->to(query.scalar_type()), allow_tf32);
  const at::Tensor sink = kernel_sink(arguments);
  const AttentionBackwardParams params{
      .dtype = kernel_scalar_type(query.scalar_type()),
      .shape = attention_shape(geometry),
      .query = strided_view(query),
      .key = strided_view(key),
      .value = strided_view(value),
      .out = strided_view(out),
      .grad_out = strided_view(grad_out),
      .logsumexp = logsumexp->const_data_ptr(),
      .grad_logsumexp =
          gradients.grad_logsumexp == nullptr ? nullptr : grad_logsumexp.const_data_ptr(),
      .unrounded_grads = outputs.unrounded(query.scalar_type()),
      .grad_query = wanted_view(outputs.query),
      .grad_key = wanted_view(outputs.key),
      .grad_value = wanted_view(outputs.value),
      .grad_mask = wanted_view(outputs.mask),
      .grad_sink = outputs.sink.defined() ? outputs.sink.mutable_data_ptr() : nullptr,
      .transform = score_transform(arguments, geometry, sink),
      .dropout = attention_dropout(arguments)};
  const cuda::CudaBackwardSchedule schedule = cuda::schedule_backward(
      params, {.deterministic = at::globalContext().deterministicAlgorithms(),
               .shared_limit = shared_memory_limit(query.device().index()),
               .allow_tf32 = allow_tf32});
  const at::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(schedule.total_bytes);
  const cuda::AttentionLaunch launch = cuda::attention_backward(
      schedule, workspace.get(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(launch.status);
  record_attention_path(launch.path);
}

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("attention_backward", TORCH_FN(attention_backward_kernel<CudaAttention>));
}

}  // namespace torch_ext
