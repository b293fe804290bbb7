// Whether a parameter's gradient may be added to its sum by the backward kernel that computes it,
// instead of travelling through autograd into .grad.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext {

/// Asked inside a backward pass. Not where somebody would miss the gradient: a hook on the
/// parameter or on its accumulation node (but for `ignore_node_hooks`), autograd.grad(), a
/// backward() that names other inputs, or one that builds a graph of itself.
bool may_bypass_autograd(const at::Tensor& param, bool ignore_node_hooks);

}  // namespace torch_ext
