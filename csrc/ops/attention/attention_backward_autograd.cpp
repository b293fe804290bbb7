// Second-order gradients: reverse mode for torch_ext::attention_backward. The pass itself stays
// fused; its own gradient is the explicit formula of attention_second_order.h, of which autograd
// takes any further order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "attention_autograd.h"
#include "attention_checks.h"
#include "attention_second_order.h"
#include "attention_signature.h"
#include "functorch_node.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kBackwardOp = "attention_backward";

// The saved list: grad_out, grad_logsumexp, and the tensors of the call. The first kInputs of it
// are the differentiable inputs; out and logsumexp are functions of those.
constexpr std::size_t kInputs = 2 + kGradientCount;
using InputSet = std::array<bool, kInputs>;

BackwardResult backward_below_autograd(const AttentionArguments& arguments,
                                       const AttentionGradients& gradients) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_backward(arguments, gradients);
}

SparseTensorList saved_inputs(const AttentionArguments& arguments,
                              const AttentionGradients& gradients) {
  SparseTensorList saved;
  saved.push(gradients.grad_out);
  saved.push(gradients.grad_logsumexp);
  for (const at::Tensor* tensor : arguments.tensors()) saved.push(tensor);
  return saved;
}

std::array<const at::Tensor*, kInputs> differentiable_inputs(const AttentionArguments& arguments,
                                                             const AttentionGradients& gradients) {
  std::array<const at::Tensor*, kInputs> inputs{gradients.grad_out, gradients.grad_logsumexp};
  const auto own = arguments.differentiable();
  std::copy(own.begin(), own.end(), inputs.begin() + 2);
  return inputs;
}

/// The gradients of the differentiable inputs, from those of the results.
variable_list second_order(const variable_list& tensors, std::int64_t present,
                           const AttentionArguments& options, const variable_list& grads,
                           const InputSet& needs_grad) {
  const variable_list saved = SparseTensorList::expand(tensors, present, 2 + kTensorCount);
  return attention_second_order(options.with_tensors(c10::ArrayRef<at::Tensor>(saved).slice(2)),
                                {.grad_out = &saved[0], .grad_logsumexp = given(saved[1])}, grads,
                                needs_grad);
}

bool any_defined(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined(); });
}

struct AttentionBackwardFunction : public torch::autograd::Function<AttentionBackwardFunction> {
  static constexpr bool is_traceable = true;

  // The differentiable inputs come one by one for apply() to find them, and once more in the two
  // structs.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*grad_out*/,
                               const OptionalTensor& /*grad_logsumexp*/,
                               const at::Tensor& /*query*/, const at::Tensor& /*key*/,
                               const at::Tensor& /*value*/, const OptionalTensor& /*attn_mask*/,
                               const OptionalTensor& /*sink*/, const AttentionArguments& arguments,
                               const AttentionGradients& gradients) {
    const variable_list all = gradient_list(backward_below_autograd(arguments, gradients));
    const SparseTensorList saved = saved_inputs(arguments, gradients);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    save_options(*context, arguments);
    // As lists of outputs must be defined, those not asked for are left out.
    SparseTensorList outputs;
    for (const at::Tensor& output : all) outputs.push(output);
    context->saved_data["outputs"] = outputs.present();
    context->set_materialize_grads(false);
    return outputs.tensors();
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(kInputs + 2);
    if (!any_defined(grads)) return result;
    const std::int64_t present = context->saved_data.at("present").toInt();
    const variable_list all_grads =
        SparseTensorList::expand(grads, context->saved_data.at("outputs").toInt(), kGradientCount);
    InputSet needs_grad{};
    std::size_t edge = 0;
    for (std::size_t input = 0; input < kInputs; ++input) {
      if ((present >> input & 1) == 0) continue;
      needs_grad[input] = context->needs_input_grad(edge++);
    }
    variable_list input_grads = second_order(context->get_saved_variables(), present,
                                             load_options(*context), all_grads, needs_grad);
    std::move(input_grads.begin(), input_grads.end(), result.begin());
    return result;
  }
};

BackwardResult collect(const variable_list& outputs, const GradientSet& output_mask) {
  variable_list all(kGradientCount);
  auto next = outputs.begin();
  for (std::size_t output = 0; output < kGradientCount; ++output) {
    if (output_mask[output]) all[output] = *next++;
  }
  return {all[kQuery], all[kKey], all[kValue], all[kMask], all[kSink]};
}

BackwardResult functorch_backward(const AttentionArguments& arguments,
                                  const AttentionGradients& gradients) {
  BackwardResult result = backward_below_autograd(arguments, gradients);
  const SparseTensorList saved = saved_inputs(arguments, gradients);
  const auto formula = [options = arguments.with_tensors(AttentionTensors()),
                        present = saved.present()](
                           const variable_list& tensors, const variable_list& grads,
                           const std::vector<bool>& needs_input_grad) -> variable_list {
    if (!any_defined(grads)) return variable_list(kInputs);
    InputSet needs_grad{};
    for (std::size_t input = 0; input < kInputs; ++input) {
      needs_grad[input] = (present >> input & 1) != 0 && needs_input_grad[input];
    }
    return second_order(tensors, present, options, grads, needs_grad);
  };
  variable_list inputs;
  for (const at::Tensor* input : differentiable_inputs(arguments, gradients)) {
    inputs.push_back(input == nullptr ? at::Tensor() : *input);
  }
  record_node("AttentionBackwardBackward", gradient_list(BackwardResult(result)), inputs,
              saved.tensors(), formula);
  return result;
}

struct AutogradAttentionBackward {
  static BackwardResult backward(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients) {
    check_attention_kinds(kBackwardOp, arguments);
    const auto inputs = differentiable_inputs(arguments, gradients);
    check_no_tangents(kBackwardOp, inputs);
    check_no_tangents(kBackwardOp, {gradients.out, gradients.logsumexp});
    if (gradients.output_mask == GradientSet{} || !needs_gradient(inputs)) {
      return backward_below_autograd(arguments, gradients);
    }
    if (in_functorch_transform()) return functorch_backward(arguments, gradients);
    return collect(AttentionBackwardFunction::apply(
                       *gradients.grad_out, optional(gradients.grad_logsumexp), *arguments.query,
                       *arguments.key, *arguments.value, optional(arguments.attn_mask),
                       optional(arguments.sink), arguments, gradients),
                   gradients.output_mask);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("attention_backward", TORCH_FN(attention_backward_kernel<AutogradAttentionBackward>));
}

}  // namespace torch_ext
