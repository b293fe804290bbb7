// Reverse-mode nodes inside torch.func transforms, where torch::autograd::Function refuses to run.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <functional>
#include <string>

namespace torch_ext {

/// Whether a torch.func transform (grad, vjp, vmap, ...) is being interpreted on this thread.
bool in_functorch_transform();

/// (saved tensors, gradients of the outputs, which inputs want theirs) -> gradients of the inputs.
/// Undefined gradients stand for zero both ways.
using BackwardFormula = std::function<torch::autograd::variable_list(
    const torch::autograd::variable_list& saved, const torch::autograd::variable_list& grads,
    const std::vector<bool>& needs_input_grad)>;

/// Makes `outputs`, computed below autograd, functions of `inputs` (undefined ones may be among
/// them). The formula has to be made of differentiable operators. Saved outputs have to be
/// detached.
void record_node(const char* name, const torch::autograd::variable_list& outputs,
                 const torch::autograd::variable_list& inputs,
                 const torch::autograd::variable_list& saved, BackwardFormula formula);

}  // namespace torch_ext
