// The gradient of varlen_attention_backward(), sequence by sequence.
#pragma once

#include <vector>

#include "varlen_arguments.h"

namespace torch_ext {

/// Gradients of grad_out, grad_logsumexp, query, key, value and sink, from `grads`, those of the
/// backward pass's results; undefined where not needed. Computes each sequence's weights explicitly
/// (attention_second_order.h), from differentiable aten operators.
std::vector<at::Tensor> varlen_second_order(const VarlenArguments& arguments,
                                            const at::Tensor& grad_out,
                                            const at::Tensor& grad_logsumexp,
                                            const std::vector<at::Tensor>& grads,
                                            const std::vector<bool>& needs_grad);

}  // namespace torch_ext
