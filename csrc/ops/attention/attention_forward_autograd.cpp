// Reverse mode for torch_ext::attention_forward: both outputs are differentiable.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_lazy_clone.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "attention_checks.h"
#include "attention_layout.h"
#include "attention_operators.h"
#include "functorch_node.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kForwardOp = "attention_forward";

// Positions in the list of saved tensors. Those from kMask on may be absent.
enum Saved : std::size_t {
  kQuery,
  kKey,
  kValue,
  kOut,
  kLogsumexp,
  kMask,
  kPadding,
  kSeed,
  kSavedCount
};

BackwardResult gradients(const variable_list& saved, const variable_list& grads,
                         const AttentionOptions& options, std::array<bool, 4> needs_grad) {
  at::Tensor grad_out = grads[0];
  if (!grad_out.defined()) {
    // Only logsumexp was used. One zero, read as a tensor of out's shape.
    const at::Tensor& out = saved[kOut];
    grad_out = at::zeros({}, out.options()).expand_symint(out.sym_sizes());
  }
  return call_attention_backward(
      grad_out, optional(grads[1]), saved[kQuery], saved[kKey], saved[kValue], saved[kOut],
      saved[kLogsumexp], optional(saved[kMask]), options.dropout_p, options.is_causal,
      options.scale, options.enable_gqa, options.causal_offset, optional(saved[kPadding]),
      optional(saved[kSeed]), needs_grad, options.contiguous);
}

ForwardResult forward_below_autograd(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     const AttentionOptions& options,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_forward(query, key, value, attn_mask, options.dropout_p, options.is_causal,
                                options.scale, options.enable_gqa, options.causal_offset,
                                key_padding_mask, dropout_seed, options.contiguous);
}

/// Whether torch would run its flash kernel, which keeps out and an additive mask as variables.
bool torch_keeps_variables(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& attn_mask, const AttentionOptions& options) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = options.dropout_p,
                                     .is_causal = options.is_causal,
                                     .scale = options.scale,
                                     .enable_gqa = options.enable_gqa,
                                     .contiguous = options.contiguous};
  return is_flash_call(
      arguments, check_attention<c10::SymInt>(kForwardOp, arguments, SeedArgument::kDrawnLater));
}

/// Boolean masks are copies, additive ones too where torch keeps none.
SparseTensorList saved_tensors(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const at::Tensor& out,
                               const at::Tensor& logsumexp, const OptionalTensor& attn_mask,
                               const OptionalTensor& key_padding_mask,
                               const OptionalTensor& dropout_seed, bool keeps_variables) {
  const at::Tensor* mask = given(attn_mask);
  const bool mask_is_kept =
      mask != nullptr && mask->is_floating_point() && (keeps_variables || mask->requires_grad());
  const at::Tensor own_mask = mask_is_kept ? *mask : mask_copy(mask);
  const at::Tensor own_padding = mask_copy(given(key_padding_mask));
  SparseTensorList saved;
  for (const at::Tensor* tensor :
       {&query, &key, &value, &out, &logsumexp, &own_mask, &own_padding, given(dropout_seed)}) {
    saved.push(tensor);
  }
  return saved;
}

variable_list expand_saved(const variable_list& tensors, std::int64_t present) {
  variable_list saved = SparseTensorList::expand(tensors, present);
  saved.resize(kSavedCount);
  return saved;
}

struct AttentionFunction : public torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const OptionalTensor& attn_mask, const AttentionOptions& options,
                               const OptionalTensor& key_padding_mask,
                               const OptionalTensor& dropout_seed) {
    auto [out, logsumexp] = forward_below_autograd(query, key, value, attn_mask, options,
                                                   key_padding_mask, dropout_seed);
    const bool keeps_variables = torch_keeps_variables(query, key, value, attn_mask, options);
    // Where torch does not keep out, its owner may write it in place: then, and only then, a lazy
    // clone becomes a copy.
    at::Tensor own_out = out;
    if (!keeps_variables && is_plain_cpu(out)) {
      const at::DisableRecordFunctionGuard one_entry_a_call;  // in a profile
      own_out = at::_lazy_clone(out);
    }
    const SparseTensorList saved = saved_tensors(query, key, value, own_out, logsumexp, attn_mask,
                                                 key_padding_mask, dropout_seed, keeps_variables);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    options.save(*context);
    context->set_materialize_grads(false);
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list saved =
        expand_saved(context->get_saved_variables(), context->saved_data.at("present").toInt());
    // Edges count the given tensors only: attn_mask is the fourth where it is there.
    const std::array<bool, 4> needs_grad{
        context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2),
        saved[kMask].defined() && saved[kMask].is_floating_point() && context->needs_input_grad(3)};
    std::tie(result[0], result[1], result[2], result[3]) =
        gradients(saved, grads, AttentionOptions::load(*context), needs_grad);
    return result;
  }
};

ForwardResult functorch_forward(const at::Tensor& query, const at::Tensor& key,
                                const at::Tensor& value, const OptionalTensor& attn_mask,
                                const AttentionOptions& options,
                                const OptionalTensor& key_padding_mask,
                                const OptionalTensor& dropout_seed) {
  auto [out, logsumexp] =
      forward_below_autograd(query, key, value, attn_mask, options, key_padding_mask, dropout_seed);
  const SparseTensorList saved = saved_tensors(query, key, value, out.detach(), logsumexp.detach(),
                                               attn_mask, key_padding_mask, dropout_seed,
                                               /*keeps_variables=*/false);
  const auto formula = [options, present = saved.present()](
                           const variable_list& tensors, const variable_list& grads,
                           const std::vector<bool>& needs_input_grad) -> variable_list {
    variable_list result(4);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list all = expand_saved(tensors, present);
    const std::array<bool, 4> needs_grad{
        needs_input_grad[0], needs_input_grad[1], needs_input_grad[2],
        needs_input_grad[3] && all[kMask].defined() && all[kMask].is_floating_point()};
    std::tie(result[0], result[1], result[2], result[3]) =
        gradients(all, grads, options, needs_grad);
    return result;
  };
  record_node("AttentionForwardBackward", {out, logsumexp},
              {query, key, value, attn_mask.value_or(at::Tensor())}, saved.tensors(), formula);
  return {out, logsumexp};
}

ForwardResult attention_forward_autograd(const at::Tensor& query, const at::Tensor& key,
                                         const at::Tensor& value, const OptionalTensor& attn_mask,
                                         double dropout_p, bool is_causal,
                                         std::optional<double> scale, bool enable_gqa,
                                         c10::SymInt causal_offset,
                                         const OptionalTensor& key_padding_mask,
                                         const OptionalTensor& dropout_seed, bool contiguous) {
  check_tensor_kind(kForwardOp, "query", query);
  check_tensor_kind(kForwardOp, "key", key);
  check_tensor_kind(kForwardOp, "value", value);
  check_no_tangents(kForwardOp, {&query, &key, &value, given(attn_mask)});
  const AttentionOptions options{.dropout_p = dropout_p,
                                 .is_causal = is_causal,
                                 .scale = scale,
                                 .enable_gqa = enable_gqa,
                                 .causal_offset = std::move(causal_offset),
                                 .contiguous = contiguous};
  if (!needs_gradient({&query, &key, &value, given(attn_mask)})) {
    return forward_below_autograd(query, key, value, attn_mask, options, key_padding_mask,
                                  dropout_seed);
  }
  if (in_functorch_transform()) {
    return functorch_forward(query, key, value, attn_mask, options, key_padding_mask, dropout_seed);
  }
  const variable_list outputs = AttentionFunction::apply(query, key, value, attn_mask, options,
                                                         key_padding_mask, dropout_seed);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_autograd));
}

}  // namespace torch_ext
