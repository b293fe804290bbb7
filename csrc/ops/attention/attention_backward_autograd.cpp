// Second-order gradients: reverse mode for torch_ext::attention_backward. The pass itself stays
// fused; its own gradient is the explicit formula of attention_second_order.h, of which autograd
// takes any further order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "attention_autograd.h"
#include "attention_checks.h"
#include "attention_operators.h"
#include "attention_second_order.h"
#include "functorch_node.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kBackwardOp = "attention_backward";

/// Tensors of one call. out and logsumexp are functions of the others: autograd sees no input
/// there.
struct BackwardTensors {
  const at::Tensor& grad_out;
  const OptionalTensor& grad_logsumexp;
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const at::Tensor& out;
  const at::Tensor& logsumexp;
  const OptionalTensor& attn_mask;
  const OptionalTensor& key_padding_mask;
  const OptionalTensor& dropout_seed;
};

BackwardResult backward_below_autograd(const BackwardTensors& tensors,
                                       const AttentionOptions& options,
                                       std::array<bool, 4> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_backward(
      tensors.grad_out, tensors.grad_logsumexp, tensors.query, tensors.key, tensors.value,
      tensors.out, tensors.logsumexp, tensors.attn_mask, options.dropout_p, options.is_causal,
      options.scale, options.enable_gqa, options.causal_offset, tensors.key_padding_mask,
      tensors.dropout_seed, output_mask, options.contiguous);
}

// Saved, and the first six are the differentiable inputs.
SparseTensorList saved_tensors(const BackwardTensors& tensors) {
  SparseTensorList saved;
  for (const at::Tensor* tensor : {&tensors.grad_out, given(tensors.grad_logsumexp), &tensors.query,
                                   &tensors.key, &tensors.value, given(tensors.attn_mask),
                                   given(tensors.key_padding_mask), given(tensors.dropout_seed)}) {
    saved.push(tensor);
  }
  return saved;
}

/// of grad_out, grad_logsumexp, query, key, value, attn_mask
variable_list second_order(const variable_list& saved_present, std::int64_t present,
                           const AttentionOptions& options, const variable_list& grads,
                           const std::array<bool, 6>& needs_grad) {
  variable_list saved = SparseTensorList::expand(saved_present, present);
  saved.resize(8);
  return attention_second_order(
      {.grad_out = saved[0],
       .grad_logsumexp = saved[1],
       .query = saved[2],
       .key = saved[3],
       .value = saved[4],
       .attn_mask = saved[5],
       .key_padding_mask = saved[6],
       .dropout_seed = saved[7],
       .options = options},
      {.query = grads[0], .key = grads[1], .value = grads[2], .attn_mask = grads[3]}, needs_grad);
}

bool any_defined(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined(); });
}

struct AttentionBackwardFunction : public torch::autograd::Function<AttentionBackwardFunction> {
  static constexpr bool is_traceable = true;

  // The differentiable inputs come one by one for apply() to find them, and once more in `tensors`.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*grad_out*/,
                               const OptionalTensor& /*grad_logsumexp*/,
                               const at::Tensor& /*query*/, const at::Tensor& /*key*/,
                               const at::Tensor& /*value*/, const OptionalTensor& /*attn_mask*/,
                               const BackwardTensors& tensors, const AttentionOptions& options,
                               std::array<bool, 4> output_mask) {
    const BackwardResult result = backward_below_autograd(tensors, options, output_mask);
    const SparseTensorList saved = saved_tensors(tensors);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    // As lists of outputs must be defined, those not asked for are left out.
    std::int64_t outputs = 0;
    variable_list list;
    const std::array<const at::Tensor*, 4> all{&std::get<0>(result), &std::get<1>(result),
                                               &std::get<2>(result), &std::get<3>(result)};
    for (int output = 0; output < 4; ++output) {
      if (!all[output]->defined()) continue;
      outputs |= std::int64_t{1} << output;
      list.push_back(*all[output]);
    }
    context->saved_data["outputs"] = outputs;
    options.save(*context);
    context->set_materialize_grads(false);
    return list;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(9);
    if (!any_defined(grads)) return result;
    const std::int64_t present = context->saved_data.at("present").toInt();
    variable_list all_grads =
        SparseTensorList::expand(grads, context->saved_data.at("outputs").toInt());
    all_grads.resize(4);
    std::array<bool, 6> needs_grad{};
    std::size_t edge = 0;
    for (int input = 0; input < 6; ++input) {
      if ((present >> input & 1) == 0) continue;
      needs_grad[input] = context->needs_input_grad(edge++);
    }
    variable_list input_grads =
        second_order(context->get_saved_variables(), present, AttentionOptions::load(*context),
                     all_grads, needs_grad);
    std::move(input_grads.begin(), input_grads.end(), result.begin());
    return result;
  }
};

BackwardResult collect(const variable_list& outputs, std::array<bool, 4> output_mask) {
  variable_list all(4);
  auto next = outputs.begin();
  for (int output = 0; output < 4; ++output) {
    if (output_mask[output]) all[output] = *next++;
  }
  return {all[0], all[1], all[2], all[3]};
}

BackwardResult functorch_backward(const BackwardTensors& tensors, const AttentionOptions& options,
                                  std::array<bool, 4> output_mask) {
  BackwardResult result = backward_below_autograd(tensors, options, output_mask);
  const SparseTensorList saved = saved_tensors(tensors);
  const auto formula = [options, present = saved.present()](
                           const variable_list& saved_present, const variable_list& grads,
                           const std::vector<bool>& needs_input_grad) -> variable_list {
    if (!any_defined(grads)) return variable_list(6);
    std::array<bool, 6> needs_grad{};
    for (int input = 0; input < 6; ++input) {
      needs_grad[input] = (present >> input & 1) != 0 && needs_input_grad[input];
    }
    return second_order(saved_present, present, options, grads, needs_grad);
  };
  const auto& [grad_query, grad_key, grad_value, grad_mask] = result;
  record_node("AttentionBackwardBackward", {grad_query, grad_key, grad_value, grad_mask},
              {tensors.grad_out, tensors.grad_logsumexp.value_or(at::Tensor()), tensors.query,
               tensors.key, tensors.value, tensors.attn_mask.value_or(at::Tensor())},
              saved.tensors(), formula);
  return result;
}

BackwardResult attention_backward_autograd(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, c10::SymInt causal_offset,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 4> output_mask, bool contiguous) {
  check_tensor_kind(kBackwardOp, "query", query);
  check_tensor_kind(kBackwardOp, "key", key);
  check_tensor_kind(kBackwardOp, "value", value);
  check_no_tangents(kBackwardOp, {&grad_out, given(grad_logsumexp), &query, &key, &value, &out,
                                  &logsumexp, given(attn_mask)});
  const AttentionOptions options{.dropout_p = dropout_p,
                                 .is_causal = is_causal,
                                 .scale = scale,
                                 .enable_gqa = enable_gqa,
                                 .causal_offset = std::move(causal_offset),
                                 .contiguous = contiguous};
  const BackwardTensors tensors{
      grad_out,  grad_logsumexp,   query,       key, value, out, logsumexp,
      attn_mask, key_padding_mask, dropout_seed};
  const bool any_output = output_mask != std::array<bool, 4>{};
  if (!any_output ||
      !needs_gradient({&grad_out, given(grad_logsumexp), &query, &key, &value, given(attn_mask)})) {
    return backward_below_autograd(tensors, options, output_mask);
  }
  if (in_functorch_transform()) return functorch_backward(tensors, options, output_mask);
  return collect(AttentionBackwardFunction::apply(grad_out, grad_logsumexp, query, key, value,
                                                  attn_mask, tensors, options, output_mask),
                 output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("attention_backward", TORCH_FN(attention_backward_autograd));
}

}  // namespace torch_ext
