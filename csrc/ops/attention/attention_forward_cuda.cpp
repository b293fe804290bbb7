// torch_ext::attention_forward on CUDA devices.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../../kernels/cuda/attention_kernels.h"
#include "../cuda_float32_precision.h"
#include "attention_call.h"
#include "attention_cuda.h"
#include "attention_layout.h"
#include "attention_operators.h"
#include "attention_path.h"

namespace torch_ext {

at::Tensor with_unit_columns(const at::Tensor& tensor, bool allow_tf32) {
  const at::ScalarType type = tensor.scalar_type();
  const bool matters =
      type == at::kBFloat16 || type == at::kHalf || (type == at::kFloat && allow_tf32);
  return matters && tensor.size(-1) > 1 && tensor.stride(-1) != 1 ? tensor.contiguous() : tensor;
}

void run_attention_forward_cuda(const AttentionArguments& arguments, std::int64_t causal_offset,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const at::Tensor& out, const at::Tensor* logsumexp) {
  const c10::cuda::CUDAGuard guard(arguments.query.device());
  if (has_no_scores(geometry)) {
    out.zero_();
    if (logsumexp != nullptr) logsumexp->fill_(-std::numeric_limits<double>::infinity());
    return record_attention_path("cuda.empty");
  }
  const bool allow_tf32 = allows_tf32();
  const at::Tensor query = with_unit_columns(arguments.query, allow_tf32);
  const at::Tensor key = with_unit_columns(arguments.key, allow_tf32);
  const at::Tensor value = with_unit_columns(arguments.value, allow_tf32);
  const AttentionArguments read{.query = query,
                                .key = key,
                                .value = value,
                                .attn_mask = arguments.attn_mask,
                                .dropout_p = arguments.dropout_p,
                                .is_causal = arguments.is_causal,
                                .scale = arguments.scale,
                                .enable_gqa = arguments.enable_gqa,
                                .key_padding_mask = arguments.key_padding_mask,
                                .dropout_seed = arguments.dropout_seed};
  const cuda::CudaForwardSchedule schedule = cuda::schedule_forward(
      forward_params(read, causal_offset, geometry, out, logsumexp), allow_tf32);
  const at::DataPtr workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(schedule.total_bytes);
  const cuda::AttentionLaunch launch = cuda::attention_forward(
      schedule, workspace.get(), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_CHECK(launch.status);
  record_attention_path(launch.path);
}

namespace {

ForwardResult attention_forward_cuda(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     bool enable_gqa, std::int64_t causal_offset,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed, bool contiguous) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed),
                                     .contiguous = contiguous};
  const auto geometry =
      check_attention<std::int64_t>("attention_forward", arguments, SeedArgument::kRequired);
  at::Tensor out = attention_out(arguments, geometry);
  at::Tensor logsumexp = at::empty(geometry.logsumexp_sizes(),
                                   query.options().dtype(accumulate_type(query.scalar_type())));
  run_attention_forward_cuda(arguments, causal_offset, geometry, out, &logsumexp);
  return {std::move(out), std::move(logsumexp)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_cuda));
}

}  // namespace torch_ext
