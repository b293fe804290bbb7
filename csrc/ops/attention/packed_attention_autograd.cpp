// Reverse mode for torch_ext::packed_attention_forward, and for its own backward pass.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "attention_cpu.h"
#include "attention_signature.h"
#include "functorch_node.h"
#include "packed_attention.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Behind out and logsumexp in the saved list: qkv, and the masks and the seed at their places among
// the tensors of a call.
constexpr std::size_t kSavedQkv = 2;
constexpr std::size_t kSavedOptions = 3;

ForwardResult packed_forward_below_autograd(const PackedProjection& packed,
                                            const AttentionArguments& options) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_packed_attention_forward(packed, options);
}

struct PackedAttentionFunction : public torch::autograd::Function<PackedAttentionFunction> {
  static constexpr bool is_traceable = true;

  // As AttentionFunction's.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*qkv*/,
                               const OptionalTensor& /*attn_mask*/, const OptionalTensor& /*sink*/,
                               const PackedProjection& packed, const AttentionArguments& options,
                               const AttentionGeometry<std::int64_t>* checked) {
    at::Tensor out, logsumexp;
    if (checked != nullptr) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(out, logsumexp) = CpuAttention::packed_forward(packed, options, *checked);
    } else {
      std::tie(out, logsumexp) = packed_forward_below_autograd(packed, options);
    }
    // As attention_forward() keeps masks. nn.MultiheadAttention merges its masks into a new one, so
    // that one from inference mode is no variable to torch either.
    const at::Tensor* mask = options.attn_mask;
    const bool mask_is_kept =
        mask != nullptr &&
        (mask->requires_grad() || (options.dropout_p == 0.0 && !mask->is_inference()));
    SparseTensorList saved;
    saved.push(out);
    saved.push(logsumexp);
    saved.push(packed.qkv);
    for (const at::Tensor& tensor : saved_tensors(options, mask_is_kept)) saved.push(tensor);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    context->saved_data["num_heads"] = packed.num_heads;
    save_options(*context, options);
    context->set_materialize_grads(false);
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto& data = context->saved_data;
    const variable_list saved = SparseTensorList::expand(
        context->get_saved_variables(), data.at("present").toInt(), kSavedOptions + kTensorCount);
    const at::Tensor& out = saved[kSavedOut];
    at::Tensor grad_out = grads[0];
    if (!grad_out.defined()) {
      grad_out = at::zeros({}, out.options()).expand_symint(out.sym_sizes());
    }
    const at::Tensor& mask = saved[kSavedOptions + kMask];
    GradientSet needs_grad{};
    needs_grad[kQuery] = needs_grad[kKey] = needs_grad[kValue] = context->needs_input_grad(0);
    std::size_t edge = 1;  // Edges count the given tensors only.
    if (mask.defined()) {
      needs_grad[kMask] = context->needs_input_grad(edge++) && mask.is_floating_point();
    }
    needs_grad[kSink] = saved[kSavedOptions + kSink].defined() && context->needs_input_grad(edge);
    std::tie(result[0], result[1], result[2]) = call_packed_attention_backward(
        {.qkv = &saved[kSavedQkv], .num_heads = data.at("num_heads").toInt()},
        load_options(*context).with_tensors(c10::ArrayRef<at::Tensor>(saved).slice(kSavedOptions)),
        {.grad_out = &grad_out,
         .grad_logsumexp = given(grads[1]),
         .out = &out,
         .logsumexp = &saved[kSavedLogsumexp],
         .output_mask = needs_grad});
    return result;
  }
};

ForwardResult apply_packed_attention_function(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGeometry<std::int64_t>* checked) {
  const variable_list outputs = PackedAttentionFunction::apply(
      *packed.qkv, optional(options.attn_mask), optional(options.sink), packed, options, checked);
  return {outputs[0], outputs[1]};
}

struct AutogradPackedAttention {
  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options) {
    check_no_tangents("packed_attention_forward", {packed.qkv, options.attn_mask, options.sink});
    if (!needs_gradient({packed.qkv, options.attn_mask, options.sink})) {
      return packed_forward_below_autograd(packed, options);
    }
    if (in_functorch_transform()) return DecomposedAttention::packed_forward(packed, options);
    return apply_packed_attention_function(packed, options, /*checked=*/nullptr);
  }

  static PackedBackwardResult packed_backward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGradients& gradients) {
    check_no_tangents("packed_attention_backward",
                      {gradients.grad_out, gradients.grad_logsumexp, packed.qkv, gradients.out,
                       gradients.logsumexp, options.attn_mask, options.sink});
    if (needs_gradient({gradients.grad_out, gradients.grad_logsumexp, packed.qkv, options.attn_mask,
                        options.sink})) {
      return DecomposedAttention::packed_backward(packed, options, gradients);
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_packed_attention_backward(packed, options, gradients);
  }
};

}  // namespace

ForwardResult record_packed_attention_forward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGeometry<std::int64_t>& checked) {
  return apply_packed_attention_function(packed, options, &checked);
}

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("packed_attention_forward",
         TORCH_FN(packed_attention_forward_kernel<AutogradPackedAttention>));
  m.impl("packed_attention_backward",
         TORCH_FN(packed_attention_backward_kernel<AutogradPackedAttention>));
}

// vmap takes both apart.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("packed_attention_forward",
         TORCH_FN(packed_attention_forward_kernel<DecomposedAttention>));
  m.impl("packed_attention_backward",
         TORCH_FN(packed_attention_backward_kernel<DecomposedAttention>));
}

}  // namespace torch_ext
