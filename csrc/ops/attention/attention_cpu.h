// The CPU side without the dispatcher, for calls that need nothing of it.
#pragma once

#include "attention_arguments.h"
#include "attention_device.h"

namespace torch_ext {

/// Computes into `out`, which has any strides. `logsumexp` is contiguous, or null: not wanted.
void run_attention_forward_cpu(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& out, const at::Tensor* logsumexp);

/// How many threads a forward pass is worth.
std::int64_t attention_workers(const AttentionGeometry<std::int64_t>& geometry);

void run_attention_backward_cpu(const AttentionArguments& arguments,
                                const AttentionGradients& gradients,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const AttentionGradientOutputs& outputs);

using CpuAttention = DeviceAttention<run_attention_forward_cpu, run_attention_backward_cpu>;

}  // namespace torch_ext
