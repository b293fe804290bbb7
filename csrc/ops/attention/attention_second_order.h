// The gradient of attention_backward(), written out.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "attention_arguments.h"

namespace torch_ext {

/// Gradients of grad_out, grad_logsumexp, query, key, value and attn_mask, from `grads`, those of
/// attention_backward()'s results; undefined where not needed, and where zero. Of `gradients`,
/// grad_out and grad_logsumexp are read. Computes the weights explicitly, (batch..., heads, q_len,
/// kv_len) at once, from differentiable aten operators.
std::vector<at::Tensor> attention_second_order(
    const AttentionArguments& arguments, const AttentionGradients& gradients,
    const std::vector<at::Tensor>& grads, const std::array<bool, 2 + kGradientCount>& needs_grad);

}  // namespace torch_ext
