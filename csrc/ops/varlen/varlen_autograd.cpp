// Reverse mode for torch_ext::varlen_attention_forward: both outputs are differentiable with
// respect to query, key, value and sink.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../attention/attention_autograd.h"
#include "../attention/attention_checks.h"
#include "../attention/functorch_node.h"
#include "../attention/plain_dispatch.h"
#include "varlen_operators.h"
#include "varlen_second_order.h"
#include "varlen_signature.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positions in the list of saved tensors. Those from kUsed on may be absent.
struct Saved {
  enum Position : std::size_t {
    kQuery,
    kKey,
    kValue,
    kOut,
    kLogsumexp,
    kCuSeqQ,
    kCuSeqK,
    kUsed,
    kSlopes,
    kSink,
    kSeed,
    kCount
  };
};

/// The arguments that are no tensors, as a node keeps them.
struct SavedOptions {
  static void save(const VarlenArguments& arguments, AutogradContext& context) {
    auto& data = context.saved_data;
    data["max_q"] = arguments.max_q;
    data["max_k"] = arguments.max_k;
    data["dropout_p"] = arguments.dropout_p;
    data["scale"] = arguments.scale;
    data["window_left"] = arguments.window_size[0];
    data["window_right"] = arguments.window_size[1];
    data["enable_gqa"] = arguments.enable_gqa;
    data["softcap"] = arguments.softcap;
  }

  static VarlenArguments load(const AutogradContext& context) {
    const auto& data = context.saved_data;
    VarlenArguments options;
    options.max_q = data.at("max_q").toSymInt();
    options.max_k = data.at("max_k").toSymInt();
    options.dropout_p = data.at("dropout_p").toDouble();
    options.scale = data.at("scale").toOptional<double>();
    options.window_size = {data.at("window_left").toInt(), data.at("window_right").toInt()};
    options.enable_gqa = data.at("enable_gqa").toBool();
    options.softcap = data.at("softcap").toDouble();
    return options;
  }
};

SparseTensorList saved_tensors(const VarlenArguments& arguments, const at::Tensor& out,
                               const at::Tensor& logsumexp) {
  SparseTensorList saved;
  for (const at::Tensor* tensor :
       {&arguments.query, &arguments.key, &arguments.value, &out, &logsumexp, &arguments.cu_seq_q,
        given(arguments.cu_seq_k), given(arguments.seqused_k), given(arguments.alibi_slopes),
        given(arguments.sink), given(arguments.dropout_seed)}) {
    saved.push(tensor);
  }
  return saved;
}

VarlenBackwardResult gradients(const variable_list& tensors, std::int64_t present,
                               VarlenArguments arguments, const variable_list& grads,
                               std::array<bool, 4> needs_grad) {
  const variable_list saved = SparseTensorList::expand(tensors, present, Saved::kCount);
  arguments.query = saved[Saved::kQuery];
  arguments.key = saved[Saved::kKey];
  arguments.value = saved[Saved::kValue];
  arguments.cu_seq_q = saved[Saved::kCuSeqQ];
  arguments.cu_seq_k = optional(given(saved[Saved::kCuSeqK]));
  arguments.seqused_k = optional(given(saved[Saved::kUsed]));
  arguments.alibi_slopes = optional(given(saved[Saved::kSlopes]));
  arguments.sink = optional(given(saved[Saved::kSink]));
  arguments.dropout_seed = optional(given(saved[Saved::kSeed]));
  at::Tensor grad_out = grads[0];
  if (!grad_out.defined()) {
    // Only logsumexp was used. One zero, read as a tensor of out's shape.
    const at::Tensor& out = saved[Saved::kOut];
    grad_out = at::zeros({}, out.options()).expand_symint(out.sym_sizes());
  }
  needs_grad[3] = needs_grad[3] && saved[Saved::kSink].defined();
  return call_varlen_attention_backward(arguments, {.grad_out = grad_out,
                                                    .grad_logsumexp = optional(given(grads[1])),
                                                    .out = saved[Saved::kOut],
                                                    .logsumexp = saved[Saved::kLogsumexp],
                                                    .output_mask = needs_grad});
}

/// The options, which a node may keep: tensors are saved, or there would be cycles.
VarlenArguments without_tensors(const VarlenArguments& arguments) {
  VarlenArguments options;
  options.max_q = arguments.max_q;
  options.max_k = arguments.max_k;
  options.dropout_p = arguments.dropout_p;
  options.scale = arguments.scale;
  options.window_size = arguments.window_size;
  options.enable_gqa = arguments.enable_gqa;
  options.softcap = arguments.softcap;
  return options;
}

VarlenForwardResult forward_below_autograd(const VarlenArguments& arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_varlen_attention_forward(arguments);
}

struct VarlenFunction : public torch::autograd::Function<VarlenFunction> {
  static constexpr bool is_traceable = true;

  // The differentiable inputs come one by one for apply() to find them, and once more in
  // `arguments`.
  static variable_list forward(AutogradContext* context, const at::Tensor& /*query*/,
                               const at::Tensor& /*key*/, const at::Tensor& /*value*/,
                               const OptionalTensor& /*sink*/, const VarlenArguments& arguments) {
    auto [out, logsumexp] = forward_below_autograd(arguments);
    const SparseTensorList saved = saved_tensors(arguments, out, logsumexp);
    context->save_for_backward(saved.tensors());
    context->saved_data["present"] = saved.present();
    SavedOptions::save(arguments, *context);
    context->set_materialize_grads(false);
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(5);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const std::int64_t present = context->saved_data.at("present").toInt();
    // Edges count the given tensors only: sink is the fourth where it is there.
    const bool has_sink = (present >> Saved::kSink & 1) != 0;
    std::tie(result[0], result[1], result[2], result[3]) =
        gradients(context->get_saved_variables(), present, SavedOptions::load(*context), grads,
                  {context->needs_input_grad(0), context->needs_input_grad(1),
                   context->needs_input_grad(2), has_sink && context->needs_input_grad(3)});
    return result;
  }
};

VarlenForwardResult functorch_forward(const VarlenArguments& arguments) {
  auto [out, logsumexp] = forward_below_autograd(arguments);
  const SparseTensorList saved = saved_tensors(arguments, out.detach(), logsumexp.detach());
  const auto formula = [options = without_tensors(arguments), present = saved.present()](
                           const variable_list& tensors, const variable_list& grads,
                           const std::vector<bool>& needs_input_grad) -> variable_list {
    variable_list result(4);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    std::tie(result[0], result[1], result[2], result[3]) = gradients(
        tensors, present, options, grads,
        {needs_input_grad[0], needs_input_grad[1], needs_input_grad[2], needs_input_grad[3]});
    return result;
  };
  record_node(
      "VarlenAttentionForwardBackward", {out, logsumexp},
      {arguments.query, arguments.key, arguments.value, arguments.sink.value_or(at::Tensor())},
      saved.tensors(), formula);
  return {out, logsumexp};
}

struct Autograd {
  static VarlenForwardResult forward(const VarlenArguments& arguments) {
    constexpr const char* kOp = "varlen_attention_forward";
    check_tensor_kind(kOp, "query", arguments.query);
    if (given(arguments.block_table) == nullptr) {
      check_tensor_kind(kOp, "key", arguments.key);
      check_tensor_kind(kOp, "value", arguments.value);
    }
    check_no_tangents(kOp,
                      {&arguments.query, &arguments.key, &arguments.value, given(arguments.sink)});
    if (!needs_gradient(
            {&arguments.query, &arguments.key, &arguments.value, given(arguments.sink)})) {
      return forward_below_autograd(arguments);
    }
    TORCH_CHECK(given(arguments.block_table) == nullptr, "torch_ext::", kOp,
                ": block_table, keys and values in pages, is for inference, got an input that "
                "requires grad: use torch.no_grad() or detach()");
    if (in_functorch_transform()) return functorch_forward(arguments);
    const variable_list outputs = VarlenFunction::apply(arguments.query, arguments.key,
                                                        arguments.value, arguments.sink, arguments);
    return {outputs[0], outputs[1]};
  }

  static VarlenBackwardResult backward(const VarlenArguments& arguments,
                                       const VarlenGradients& gradients) {
    check_no_tangents("varlen_attention_backward",
                      {&gradients.grad_out, given(gradients.grad_logsumexp), &arguments.query,
                       &arguments.key, &arguments.value, given(arguments.sink)});
    VarlenBackwardResult result;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      result = call_varlen_attention_backward(arguments, gradients);
    }
    const variable_list inputs{gradients.grad_out, gradients.grad_logsumexp.value_or(at::Tensor()),
                               arguments.query,    arguments.key,
                               arguments.value,    arguments.sink.value_or(at::Tensor())};
    const bool recorded =
        needs_gradient({&inputs[0], &inputs[1], &inputs[2], &inputs[3], &inputs[4], &inputs[5]});
    if (!recorded) return result;
    // Of the saved list, the first six are the differentiable inputs.
    SparseTensorList saved;
    for (const at::Tensor& input : inputs) saved.push(input);
    for (const at::Tensor* tensor :
         {&arguments.cu_seq_q, given(arguments.cu_seq_k), given(arguments.seqused_k),
          given(arguments.alibi_slopes), given(arguments.dropout_seed)}) {
      saved.push(tensor);
    }
    const auto formula = [options = without_tensors(arguments), present = saved.present()](
                             const variable_list& tensors, const variable_list& grads,
                             const std::vector<bool>& needs_input_grad) {
      const variable_list all = SparseTensorList::expand(tensors, present, 11);
      VarlenArguments saved_arguments = options;
      saved_arguments.query = all[2];
      saved_arguments.key = all[3];
      saved_arguments.value = all[4];
      saved_arguments.sink = optional(given(all[5]));
      saved_arguments.cu_seq_q = all[6];
      saved_arguments.cu_seq_k = optional(given(all[7]));
      saved_arguments.seqused_k = optional(given(all[8]));
      saved_arguments.alibi_slopes = optional(given(all[9]));
      saved_arguments.dropout_seed = optional(given(all[10]));
      return varlen_second_order(saved_arguments, all[0], all[1], grads, needs_input_grad);
    };
    const auto& [grad_query, grad_key, grad_value, grad_sink] = result;
    record_node("VarlenAttentionBackwardBackward", {grad_query, grad_key, grad_value, grad_sink},
                inputs, saved.tensors(), formula);
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  m.impl("varlen_attention_forward", TORCH_FN(VarlenEntries<Autograd>::forward));
  m.impl("varlen_attention_backward", TORCH_FN(VarlenEntries<Autograd>::backward));
}

}  // namespace torch_ext
