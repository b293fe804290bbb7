#include "varlen_operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "../attention/plain_dispatch.h"
#include "varlen_checks.h"
#include "varlen_signature.h"

namespace torch_ext {
namespace {

struct Composite {
  static VarlenForwardResult forward(VarlenArguments arguments) {
    return seeded_varlen_attention(std::move(arguments));
  }
};

template <typename Signature>
c10::TypedOperatorHandle<Signature> handle_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

VarlenForwardResult call_varlen_attention_forward(const VarlenArguments& arguments) {
  static const auto handle =
      handle_of<decltype(VarlenEntries<Composite>::forward)>("torch_ext::varlen_attention_forward");
  return handle.call(arguments.query, arguments.key, arguments.value, arguments.cu_seq_q,
                     arguments.cu_seq_k, arguments.max_q, arguments.max_k, arguments.dropout_p,
                     arguments.scale, arguments.window_size, arguments.enable_gqa,
                     arguments.seqused_k, arguments.softcap, arguments.alibi_slopes, arguments.sink,
                     arguments.dropout_seed, arguments.block_table, arguments.leftpad_k,
                     arguments.k_scale, arguments.v_scale);
}

VarlenBackwardResult call_varlen_attention_backward(const VarlenArguments& arguments,
                                                    const VarlenGradients& gradients) {
  static const auto handle = handle_of<decltype(VarlenEntries<Composite>::backward)>(
      "torch_ext::varlen_attention_backward");
  return handle.call(gradients.grad_out, gradients.grad_logsumexp, arguments.query, arguments.key,
                     arguments.value, gradients.out, gradients.logsumexp, arguments.cu_seq_q,
                     *arguments.cu_seq_k, arguments.max_q, arguments.max_k, arguments.dropout_p,
                     arguments.scale, arguments.window_size, arguments.enable_gqa,
                     arguments.seqused_k, arguments.softcap, arguments.alibi_slopes, arguments.sink,
                     arguments.dropout_seed, gradients.output_mask);
}

VarlenForwardResult seeded_varlen_attention(VarlenArguments arguments) {
  const bool draws = arguments.dropout_p > 0.0 && given(arguments.dropout_seed) == nullptr;
  check_varlen("varlen_attn", arguments,
               draws ? SeedArgument::kDrawnLater : SeedArgument::kRequired);
  if (draws) arguments.dropout_seed = draw_dropout_seed(arguments.query);
  return call_varlen_attention_forward(arguments);
}

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> seeded{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  const std::string options =
      "SymInt max_q, SymInt max_k, float dropout_p=0.0, *, "
      "float? scale=None, int[2] window_size=[-1, -1], bool enable_gqa=False, "
      "Tensor? seqused_k=None, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sink=None, "
      "Tensor? dropout_seed=None";
  const std::string forward =
      "(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, " + options +
      ", Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? k_scale=None, "
      "Tensor? v_scale=None) -> (Tensor out, Tensor logsumexp)";
  // varlen_attention_forward() below, which draws its seed where dropout_p > 0 and none is given.
  m.def(("varlen_attention" + forward).c_str(), seeded);
  m.def(("varlen_attention_forward" + forward).c_str(), pure);
  // output_mask: of query, key, value and sink, which gradients are wanted; the others come back
  // undefined (None).
  m.def(("varlen_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, "
         "Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cu_seq_q, "
         "Tensor cu_seq_k, " +
         options +
         ", bool[4] output_mask=[True, True, True, False]) "
         "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sink)")
            .c_str(),
        pure);
}

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("varlen_attention", TORCH_FN(VarlenEntries<Composite>::forward));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("varlen_attention", TORCH_FN(VarlenEntries<Composite>::forward));
}

}  // namespace torch_ext
