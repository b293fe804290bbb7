// The CUDA side without the dispatcher, shared by the operators over separate and packed tensors.
#pragma once

#include "attention_arguments.h"
#include "attention_backward_outputs.h"
#include "attention_checks.h"

namespace torch_ext {

/// Computes into `out`, which has any strides. `logsumexp` is contiguous, or null: not wanted.
void run_attention_forward_cuda(const AttentionArguments& arguments, std::int64_t causal_offset,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const at::Tensor& out, const at::Tensor* logsumexp);

void run_attention_backward_cuda(const AttentionArguments& arguments, std::int64_t causal_offset,
                                 const AttentionGradients& gradients,
                                 const AttentionGeometry<std::int64_t>& geometry,
                                 const AttentionGradientOutputs& outputs);

/// What the tensor core kernels take: columns one behind the other. Other 16-bit tensors are
/// copied; the kernels of the other dtypes take any strides.
at::Tensor with_unit_columns(const at::Tensor& tensor);

}  // namespace torch_ext
