// Reverse mode for torch_ext::attention_forward: both outputs are differentiable.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_lazy_clone.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "attention_checks.h"
#include "attention_cpu.h"
#include "attention_layout.h"
#include "attention_signature.h"
#include "functorch_node.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kForwardOp = "attention_forward";

// Behind out and logsumexp in the saved list: the tensors of the call.
constexpr std::size_t kSavedCall = 2;

variable_list expand_saved(const variable_list& tensors, std::int64_t present) {
  return SparseTensorList::expand(tensors, present, kSavedCall + kTensorCount);
}

variable_list gradients(const variable_list& saved, const variable_list& grads,
                        const AttentionArguments& options, const GradientSet& needs_grad) {
  at::Tensor grad_out = grads[0];
  if (!grad_out.defined()) {
    // Only logsumexp was used. One zero, read as a tensor of out's shape.
    const at::Tensor& out = saved[kSavedOut];
    grad_out = at::zeros({}, out.options()).expand_symint(out.sym_sizes());
  }
  return gradient_list(call_attention_backward(
      options.with_tensors(c10::ArrayRef<at::Tensor>(saved).slice(kSavedCall)),
      {.grad_out = &grad_out,
       .grad_logsumexp = given(grads[1]),
       .out = &saved[kSavedOut],
       .logsumexp = &saved[kSavedLogsumexp],
       .output_mask = needs_grad}));
}

ForwardResult forward_below_autograd(const AttentionArguments& arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_forward(arguments);
}

/// Whether torch would run its flash kernel, which keeps out and an additive mask as variables.
bool torch_keeps_variables(const AttentionArguments& arguments) {
  return is_flash_call(
      arguments, check_attention<c10::SymInt>(kForwardOp, arguments, SeedArgument::kDrawnLater));
}

SparseTensorList saved_list(const AttentionArguments& arguments, const at::Tensor& out,
                            const at::Tensor& logsumexp, bool keeps_variables) {
  const at::Tensor* mask = arguments.attn_mask;
  SparseTensorList saved;
  saved.push(out);
  saved.push(logsumexp);
  for (const at::Tensor& tensor :
       saved_tensors(arguments, keeps_variables || (mask != nullptr && mask->requires_grad()))) {
    saved.push(tensor);
  }
  return saved;
}

struct AttentionFunction : public torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;

  // The differentiable inputs come one by one for apply() to find them, and once more in
  // `arguments`. `checked`: their geometry, and null where they have yet to be checked.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*query*/,
                               const at::Tensor& /*key*/, const at::Tensor& /*value*/,
                               const OptionalTensor& /*attn_mask*/, const OptionalTensor& /*sink*/,
                               const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>* checked) {
    ForwardResult result;
    bool keeps_variables = false;
    if (checked != nullptr) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      result = CpuAttention::forward(arguments, *checked);
      keeps_variables = is_flash_call(arguments, *checked);
    } else {
      result = forward_below_autograd(arguments);
      keeps_variables = torch_keeps_variables(arguments);
    }
    const auto& [out, logsumexp] = result;
    // Where torch does not keep out, its owner may write it in place: then, and only then, a lazy
    // clone becomes a copy.
    at::Tensor own_out = out;
    if (!keeps_variables && is_plain_cpu(out)) {
      const at::DisableRecordFunctionGuard one_entry_a_call;  // in a profile
      own_out = at::_lazy_clone(out);
    }
    const SparseTensorList saved = saved_list(arguments, own_out, logsumexp, keeps_variables);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    save_options(*context, arguments);
    context->set_materialize_grads(false);
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(kGradientCount + 2);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved =
        expand_saved(context->get_saved_variables(), context->saved_data.at("present").toInt());
    GradientSet needs_grad{};
    std::size_t edge = 0;  // Edges count the given tensors only.
    for (std::size_t input = 0; input < kGradientCount; ++input) {
      const at::Tensor& tensor = saved[kSavedCall + input];
      if (!tensor.defined()) continue;
      needs_grad[input] = context->needs_input_grad(edge++) && tensor.is_floating_point();
    }
    variable_list input_grads = gradients(saved, grads, load_options(*context), needs_grad);
    std::move(input_grads.begin(), input_grads.end(), result.begin());
    return result;
  }
};

ForwardResult apply_attention_function(const AttentionArguments& arguments,
                                       const AttentionGeometry<std::int64_t>* checked) {
  const variable_list outputs = AttentionFunction::apply(
      *arguments.query, *arguments.key, *arguments.value, optional(arguments.attn_mask),
      optional(arguments.sink), arguments, checked);
  return {outputs[0], outputs[1]};
}

ForwardResult functorch_forward(const AttentionArguments& arguments) {
  auto [out, logsumexp] = forward_below_autograd(arguments);
  const SparseTensorList saved =
      saved_list(arguments, out.detach(), logsumexp.detach(), /*keeps_variables=*/false);
  const auto formula = [options = arguments.with_tensors(AttentionTensors()),
                        present = saved.present()](
                           const variable_list& tensors, const variable_list& grads,
                           const std::vector<bool>& needs_input_grad) -> variable_list {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(kGradientCount);
    const variable_list all = expand_saved(tensors, present);
    GradientSet needs_grad{};
    for (std::size_t input = 0; input < kGradientCount; ++input) {
      const at::Tensor& tensor = all[kSavedCall + input];
      needs_grad[input] = needs_input_grad[input] && tensor.defined() && tensor.is_floating_point();
    }
    return gradients(all, grads, options, needs_grad);
  };
  variable_list inputs;
  for (const at::Tensor* input : arguments.differentiable()) {
    inputs.push_back(input == nullptr ? at::Tensor() : *input);
  }
  record_node("AttentionForwardBackward", {out, logsumexp}, inputs, saved.tensors(), formula);
  return {out, logsumexp};
}

struct AutogradAttention {
  static ForwardResult forward(const AttentionArguments& arguments) {
    check_attention_kinds(kForwardOp, arguments);
    check_no_tangents(kForwardOp, arguments.differentiable());
    if (!needs_gradient(arguments.differentiable())) return forward_below_autograd(arguments);
    if (in_functorch_transform()) return functorch_forward(arguments);
    return apply_attention_function(arguments, /*checked=*/nullptr);
  }
};

}  // namespace

ForwardResult record_attention_forward(const AttentionArguments& arguments,
                                       const AttentionGeometry<std::int64_t>& checked) {
  return apply_attention_function(arguments, &checked);
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<AutogradAttention>));
}

}  // namespace torch_ext
