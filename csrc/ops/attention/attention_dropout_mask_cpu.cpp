// torch_ext::attention_dropout_mask on the CPU: the kernels' dropout mask as a tensor.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../../kernels/counter_rng.h"
#include "attention_checks.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "attention_dropout_mask";

at::Tensor attention_dropout_mask_cpu(const at::Tensor& dropout_seed, double dropout_p,
                                      at::IntArrayRef sizes) {
  check_dropout_p(kOp, dropout_p);
  check_dropout_seed(kOp, &dropout_seed, c10::Device(c10::kCPU));
  check_score_sizes(kOp, sizes.size());
  const at::Tensor mask = at::empty(sizes, dropout_seed.options().dtype(at::kBool));
  const std::int64_t q_len = sizes[sizes.size() - 2];
  const std::int64_t kv_len = sizes[sizes.size() - 1];
  if (mask.numel() == 0) return mask;
  const auto seed = static_cast<std::uint64_t>(*dropout_seed.const_data_ptr<std::int64_t>());
  const std::uint32_t threshold = dropout_threshold(dropout_p);
  bool* const data = mask.mutable_data_ptr<bool>();
  const std::int64_t grain = std::max<std::int64_t>(1, 4096 / kv_len);
  at::parallel_for(0, mask.numel() / kv_len, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t key = 0; key < kv_len; ++key) {
        data[row * kv_len + key] = dropout_keeps(seed, threshold, row / q_len, row % q_len, key);
      }
    }
  });
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl(kOp, TORCH_FN(attention_dropout_mask_cpu)); }

}  // namespace torch_ext
