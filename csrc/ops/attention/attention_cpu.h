// The CPU side without the dispatcher, for calls that need nothing of it.
#pragma once

#include "attention_arguments.h"
#include "attention_backward_outputs.h"
#include "attention_checks.h"

namespace torch_ext {

/// Computes into `out`, which has any strides. `logsumexp` is contiguous, or null: not wanted.
void run_attention_forward_cpu(const AttentionArguments& arguments, std::int64_t causal_offset,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& out, const at::Tensor* logsumexp);

/// How many threads a forward pass is worth.
std::int64_t attention_workers(const AttentionGeometry<std::int64_t>& geometry);

void run_attention_backward_cpu(const AttentionArguments& arguments, std::int64_t causal_offset,
                                const AttentionGradients& gradients,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const AttentionGradientOutputs& outputs);

/// packed_attention_forward(). Writes `*logsumexp` where it is not null.
at::Tensor run_packed_attention_forward_cpu(const char* op, const at::Tensor& qkv,
                                            std::int64_t num_heads, const at::Tensor* attn_mask,
                                            double dropout_p, bool is_causal,
                                            const at::Tensor* key_padding_mask,
                                            const at::Tensor* dropout_seed, at::Tensor* logsumexp);

}  // namespace torch_ext
