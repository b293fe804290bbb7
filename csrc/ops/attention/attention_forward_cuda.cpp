// torch_ext::attention_forward on CUDA devices.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/attention_kernels.h"
#include "../cuda_float32_precision.h"
#include "attention_call.h"
#include "attention_cuda.h"
#include "attention_path.h"
#include "attention_signature.h"

namespace torch_ext {

void check_cuda_options(const AttentionArguments& arguments) {
  const auto refuse = [](bool given, const char* option) {
    TORCH_CHECK_NOT_IMPLEMENTED(!given, "torch_ext: ", option,
                                " is not supported on CUDA yet; it is on the CPU");
  };
  refuse(arguments.window_left != -1 || arguments.window_right != -1, "window_size");
  refuse(arguments.softcap > 0.0, "softcap");
  refuse(arguments.alibi_slopes != nullptr, "alibi_slopes");
  refuse(arguments.sink != nullptr, "sink");
}

at::Tensor with_unit_columns(const at::Tensor& tensor, bool allow_tf32) {
  const at::ScalarType type = tensor.scalar_type();
  const bool matters =
      type == at::kBFloat16 || type == at::kHalf || (type == at::kFloat && allow_tf32);
  return matters && tensor.size(-1) > 1 && tensor.stride(-1) != 1 ? tensor.contiguous() : tensor;
}

void run_attention_forward_cuda(const AttentionArguments& arguments,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const at::Tensor& out, const at::Tensor* logsumexp) {
  check_cuda_options(arguments);
  const c10::cuda::CUDAGuard guard(arguments.query->device());
  if (has_no_scores(geometry)) {
    write_no_scores(arguments, out, logsumexp);
    return record_attention_path("cuda.empty");
  }
  const bool allow_tf32 = allows_tf32();
  const at::Tensor query = with_unit_columns(*arguments.query, allow_tf32);
  const at::Tensor key = with_unit_columns(*arguments.key, allow_tf32);
  const at::Tensor value = with_unit_columns(*arguments.value, allow_tf32);
  const at::Tensor sink = kernel_sink(arguments);
  AttentionArguments read = arguments;
  read.query = &query;
  read.key = &key;
  read.value = &value;
  const cuda::CudaForwardSchedule schedule =
      cuda::schedule_forward(forward_params(read, geometry, sink, out, logsumexp), allow_tf32);
  const at::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(schedule.total_bytes);
  const cuda::AttentionLaunch launch = cuda::attention_forward(
      schedule, workspace.get(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(launch.status);
  record_attention_path(launch.path);
}

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<CudaAttention>));
}

}  // namespace torch_ext
