// torch_ext::attention_dropout_mask on CUDA devices.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/counter_rng.h"
#include "../../kernels/cuda/attention_kernels.h"
#include "attention_checks.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "attention_dropout_mask";

at::Tensor attention_dropout_mask_cuda(const at::Tensor& dropout_seed, double dropout_p,
                                       at::IntArrayRef sizes) {
  check_dropout_p(kOp, dropout_p);
  check_dropout_seed(kOp, &dropout_seed, dropout_seed.device());
  check_score_sizes(kOp, sizes.size());
  const c10::cuda::CUDAGuard guard(dropout_seed.device());
  at::Tensor mask = at::empty(sizes, dropout_seed.options().dtype(at::kBool));
  if (mask.numel() == 0) return mask;
  const std::int64_t q_len = sizes[sizes.size() - 2];
  const std::int64_t kv_len = sizes[sizes.size() - 1];
  const cuda::DropoutMaskArgs args{.seed = dropout_seed.const_data_ptr<std::int64_t>(),
                                   .threshold = dropout_threshold(dropout_p),
                                   .mask = static_cast<std::uint8_t*>(mask.mutable_data_ptr()),
                                   .slices = mask.numel() / (q_len * kv_len),
                                   .q_len = q_len,
                                   .kv_len = kv_len};
  C10_CUDA_CHECK(cuda::attention_dropout_mask(args, c10::cuda::getCurrentCUDAStream().stream()));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl(kOp, TORCH_FN(attention_dropout_mask_cuda)); }

}  // namespace torch_ext
