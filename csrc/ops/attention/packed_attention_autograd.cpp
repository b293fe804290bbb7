// Reverse mode for torch_ext::packed_attention_forward, and for its own backward pass.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "functorch_node.h"
#include "packed_attention.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ForwardResult forward_below_autograd(const at::Tensor& qkv, std::int64_t num_heads,
                                     const OptionalTensor& attn_mask, double dropout_p,
                                     bool is_causal, const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_packed_attention_forward(qkv, num_heads, attn_mask, dropout_p, is_causal,
                                       key_padding_mask, dropout_seed);
}

struct PackedAttentionFunction : public torch::autograd::Function<PackedAttentionFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& qkv,
                               const OptionalTensor& attn_mask, std::int64_t num_heads,
                               double dropout_p, bool is_causal,
                               const OptionalTensor& key_padding_mask,
                               const OptionalTensor& dropout_seed) {
    auto [out, logsumexp] = forward_below_autograd(qkv, num_heads, attn_mask, dropout_p, is_causal,
                                                   key_padding_mask, dropout_seed);
    // As attention_forward() keeps masks. nn.MultiheadAttention merges its masks into a new one, so
    // that one from inference mode is no variable to torch either.
    const at::Tensor* mask = given(attn_mask);
    const bool mask_is_kept =
        mask != nullptr && mask->is_floating_point() &&
        (mask->requires_grad() || (dropout_p == 0.0 && !mask->is_inference()));
    const at::Tensor own_mask = mask_is_kept ? *mask : mask_copy(mask);
    const at::Tensor own_padding = mask_copy(given(key_padding_mask));
    SparseTensorList saved;
    for (const at::Tensor* tensor :
         {&qkv, static_cast<const at::Tensor*>(&out), static_cast<const at::Tensor*>(&logsumexp),
          &own_mask, &own_padding, given(dropout_seed)}) {
      saved.push(tensor);
    }
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    context->saved_data["num_heads"] = num_heads;
    context->saved_data["dropout_p"] = dropout_p;
    context->saved_data["is_causal"] = is_causal;
    context->set_materialize_grads(false);
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto& data = context->saved_data;
    variable_list saved =
        SparseTensorList::expand(context->get_saved_variables(), data.at("present").toInt());
    saved.resize(6);
    const auto& [qkv, out, logsumexp, attn_mask, key_padding_mask, dropout_seed] =
        std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]);
    at::Tensor grad_out = grads[0];
    if (!grad_out.defined()) {
      grad_out = at::zeros({}, out.options()).expand_symint(out.sym_sizes());
    }
    const std::array<bool, 2> needs_grad{
        context->needs_input_grad(0),
        attn_mask.defined() && attn_mask.is_floating_point() && context->needs_input_grad(1)};
    std::tie(result[0], result[1]) = call_packed_attention_backward(
        grad_out, optional(grads[1]), qkv, data.at("num_heads").toInt(), out, logsumexp,
        optional(attn_mask), data.at("dropout_p").toDouble(), data.at("is_causal").toBool(),
        optional(key_padding_mask), optional(dropout_seed), needs_grad);
    return result;
  }
};

ForwardResult packed_attention_forward_autograd(const at::Tensor& qkv, std::int64_t num_heads,
                                                const OptionalTensor& attn_mask, double dropout_p,
                                                bool is_causal,
                                                const OptionalTensor& key_padding_mask,
                                                const OptionalTensor& dropout_seed) {
  check_no_tangents("packed_attention_forward", {&qkv, given(attn_mask)});
  if (!needs_gradient({&qkv, given(attn_mask)})) {
    return forward_below_autograd(qkv, num_heads, attn_mask, dropout_p, is_causal, key_padding_mask,
                                  dropout_seed);
  }
  if (in_functorch_transform()) {
    return decomposed_packed_forward(qkv, num_heads, attn_mask, dropout_p, is_causal,
                                     key_padding_mask, dropout_seed);
  }
  const variable_list outputs = PackedAttentionFunction::apply(
      qkv, attn_mask, num_heads, dropout_p, is_causal, key_padding_mask, dropout_seed);
  return {outputs[0], outputs[1]};
}

PackedBackwardResult packed_attention_backward_autograd(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask) {
  check_no_tangents("packed_attention_backward",
                    {&grad_out, given(grad_logsumexp), &qkv, &out, &logsumexp, given(attn_mask)});
  if (needs_gradient({&grad_out, given(grad_logsumexp), &qkv, given(attn_mask)})) {
    return decomposed_packed_backward(grad_out, grad_logsumexp, qkv, num_heads, out, logsumexp,
                                      attn_mask, dropout_p, is_causal, key_padding_mask,
                                      dropout_seed, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_packed_attention_backward(grad_out, grad_logsumexp, qkv, num_heads, out, logsumexp,
                                        attn_mask, dropout_p, is_causal, key_padding_mask,
                                        dropout_seed, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("packed_attention_forward", TORCH_FN(packed_attention_forward_autograd));
  m.impl("packed_attention_backward", TORCH_FN(packed_attention_backward_autograd));
}

// vmap takes both apart.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("packed_attention_forward", TORCH_FN(decomposed_packed_forward));
  m.impl("packed_attention_backward", TORCH_FN(decomposed_packed_backward));
}

}  // namespace torch_ext
