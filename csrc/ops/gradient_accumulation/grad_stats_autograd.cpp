// The gradient of the norms: d norm / d grad = grad / norm.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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

/// grad_norm / norm, 0 where the norm is 0: torch's subgradient there.
at::Tensor direction(const at::Tensor& grad_norm, const at::Tensor& norm) {
  return at::where(norm == 0, at::zeros_like(norm), grad_norm / norm);
}

struct GradStatsFunction : torch::autograd::Function<GradStatsFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, variable_list grads) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [norm, norms, found_inf] = call_grad_stats(grads);
    variable_list saved = std::move(grads);
    saved.push_back(norm);
    saved.push_back(norms);
    context->save_for_backward(std::move(saved));
    context->mark_non_differentiable({found_inf});
    return {norm, norms, found_inf};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    variable_list saved = context->get_saved_variables();
    const at::Tensor norms = saved.back();
    saved.pop_back();
    const at::Tensor norm = saved.back();
    saved.pop_back();
    variable_list result;
    result.reserve(saved.size());
    const at::Tensor of_all =
        grad_outputs[0].defined() ? direction(grad_outputs[0], norm) : at::Tensor();
    const at::Tensor of_each =
        grad_outputs[1].defined() ? direction(grad_outputs[1], norms) : at::Tensor();
    for (std::size_t i = 0; i < saved.size(); ++i) {
      at::Tensor factor = of_all;
      if (of_each.defined()) {
        const at::Tensor own = of_each.select(0, static_cast<std::int64_t>(i));
        factor = factor.defined() ? factor + own : own;
      }
      result.push_back(factor.defined() ? saved[i] * factor.to(saved[i].scalar_type())
                                        : at::Tensor());
    }
    return result;
  }
};

GradStatsResult grad_stats_autograd(at::TensorList grads) {
  bool wanted = false;
  for (const at::Tensor& grad : grads) wanted = wanted || needs_gradient({&grad});
  if (!wanted) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_grad_stats(grads);
  }
  const variable_list result = GradStatsFunction::apply(grads.vec());
  return {result[0], result[1], result[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("grad_stats", TORCH_FN(grad_stats_autograd)); }

}  // namespace torch_ext
