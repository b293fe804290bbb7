// The CUDA side without the dispatcher, shared by the operators over separate and packed tensors.
#pragma once

#include "attention_arguments.h"
#include "attention_device.h"

namespace torch_ext {

/// Refuses the options that the CUDA kernels do not know yet.
void check_cuda_options(const AttentionArguments& arguments);

/// Computes into `out`, which has any strides. `logsumexp` is contiguous, or null: not wanted.
void run_attention_forward_cuda(const AttentionArguments& arguments,
                                const AttentionGeometry<std::int64_t>& geometry,
                                const at::Tensor& out, const at::Tensor* logsumexp);

void run_attention_backward_cuda(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients,
                                 const AttentionGeometry<std::int64_t>& geometry,
                                 const AttentionGradientOutputs& outputs);

using CudaAttention = DeviceAttention<run_attention_forward_cuda, run_attention_backward_cuda>;

/// What the tensor core kernels take: columns one behind the other. Others are copied if they are
/// of 16 bits, or of fp32 that may be rounded to TF32; the other kernels take any strides.
at::Tensor with_unit_columns(const at::Tensor& tensor, bool allow_tf32);

}  // namespace torch_ext
