// The gradient of the norms: d norm / d grad = grad / norm.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../attention/functorch_node.h"
#include "../attention/plain_dispatch.h"
#include "accumulation_operators.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

GradStatsResult call_grad_stats(at::TensorList grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::grad_stats", "")
                             .typed<GradStatsResult(at::TensorList)>();
  return op.call(grads);
}

GradStatsResult grad_stats_below_autograd(at::TensorList grads) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_grad_stats(grads);
}

/// grad_norm / norm, 0 where the norm is 0: torch's subgradient there, and no NaN in its own
/// gradient.
at::Tensor direction(const at::Tensor& grad_norm, const at::Tensor& norm) {
  const at::Tensor is_zero = norm == 0;
  return at::where(is_zero, 0, grad_norm) / at::where(is_zero, 1, norm);
}

variable_list gradients(at::TensorList grads, const at::Tensor& norm, const at::Tensor& norms,
                        const at::Tensor& grad_norm, const at::Tensor& grad_norms) {
  const at::Tensor of_all = grad_norm.defined() ? direction(grad_norm, norm) : at::Tensor();
  const at::Tensor of_each = grad_norms.defined() ? direction(grad_norms, norms) : at::Tensor();
  variable_list result;
  result.reserve(grads.size());
  for (std::size_t i = 0; i < grads.size(); ++i) {
    at::Tensor factor = of_all;
    if (of_each.defined()) {
      const at::Tensor own = of_each.select(0, static_cast<std::int64_t>(i));
      factor = factor.defined() ? factor + own : own;
    }
    result.push_back(factor.defined() ? (grads[i] * factor).to(grads[i].scalar_type())
                                      : at::Tensor());
  }
  return result;
}

struct GradStatsFunction : torch::autograd::Function<GradStatsFunction> {
  static constexpr bool is_traceable = true;

  // A TensorList: a vector of tensors does not count as variables.
  static variable_list forward(AutogradContext* context, at::TensorList grads) {
    auto [norm, norms, found_inf] = grad_stats_below_autograd(grads);
    variable_list saved = grads.vec();
    saved.push_back(norm);
    saved.push_back(norms);
    context->save_for_backward(std::move(saved));
    context->mark_non_differentiable({found_inf});
    context->set_materialize_grads(false);
    return {norm, norms, found_inf};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const std::size_t count = saved.size() - 2;
    return gradients(at::TensorList(saved).slice(0, count), saved[count], saved[count + 1],
                     grad_outputs[0], grad_outputs[1]);
  }
};

GradStatsResult functorch_grad_stats(at::TensorList grads) {
  auto [norm, norms, found_inf] = grad_stats_below_autograd(grads);
  // The norms anew, so that they are functions of the gradients for a second order too.
  const auto formula = [](const variable_list& saved, const variable_list& grad_outputs,
                          const std::vector<bool>&) -> variable_list {
    if (!grad_outputs[0].defined() && !grad_outputs[1].defined()) {
      return variable_list(saved.size());
    }
    const auto [norm, norms, found_inf] = call_grad_stats(saved);
    return gradients(saved, norm, norms, grad_outputs[0], grad_outputs[1]);
  };
  record_node("GradStatsBackward", {norm, norms}, grads.vec(), grads.vec(), formula);
  return {norm, norms, found_inf};
}

GradStatsResult grad_stats_autograd(at::TensorList grads) {
  bool wanted = false;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    TORCH_CHECK(!grad.is_nested(), "torch_ext::grad_stats: grads[", i,
                "] takes a dense tensor; nested tensors are not supported");
    TORCH_CHECK_NOT_IMPLEMENTED(!grad._fw_grad(/*level=*/0).defined(),
                                "torch_ext::grad_stats: grads[", i, "]", kNoForwardMode);
    wanted = wanted || needs_gradient({&grad});
  }
  if (!wanted) return grad_stats_below_autograd(grads);
  if (in_functorch_transform()) return functorch_grad_stats(grads);
  const variable_list result = GradStatsFunction::apply(grads);
  return {result[0], result[1], result[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("grad_stats", TORCH_FN(grad_stats_autograd)); }

}  // namespace torch_ext
