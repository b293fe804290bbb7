// torch_ext::packed_attention_forward and packed_attention_backward on the CPU.
#include <torch/library.h>

#include "attention_cpu.h"
#include "packed_attention_kernels.h"

namespace torch_ext {
namespace {

using Kernels = PackedAttentionKernels<run_attention_forward_cpu, run_attention_backward_cpu>;

}  // namespace

at::Tensor run_packed_attention_forward_cpu(const char* op, const at::Tensor& qkv,
                                            std::int64_t num_heads, const at::Tensor* attn_mask,
                                            double dropout_p, bool is_causal,
                                            const at::Tensor* key_padding_mask,
                                            const at::Tensor* dropout_seed, at::Tensor* logsumexp) {
  return Kernels::run_forward(op, qkv, num_heads, attn_mask, dropout_p, is_causal, key_padding_mask,
                              dropout_seed, logsumexp);
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("packed_attention_forward", TORCH_FN(Kernels::forward));
  m.impl("packed_attention_backward", TORCH_FN(Kernels::backward));
}

}  // namespace torch_ext
