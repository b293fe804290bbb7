// Shapes, strides and dtypes of attention_forward and attention_backward without data, symbolic
// sizes included: the same checks as on the devices, and the same strides.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_backward_outputs.h"
#include "attention_checks.h"
#include "attention_layout.h"
#include "attention_signature.h"

namespace torch_ext {
namespace {

struct MetaAttention {
  static ForwardResult forward(const AttentionArguments& arguments) {
    const auto geometry =
        check_attention<c10::SymInt>("attention_forward", arguments, SeedArgument::kRequired);
    const at::Tensor& query = *arguments.query;
    return {attention_out(arguments, geometry),
            at::empty_symint(geometry.logsumexp_sizes(),
                             query.options().dtype(accumulate_type(query.scalar_type())))};
  }

  static BackwardResult backward(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients) {
    constexpr const char* kOp = "attention_backward";
    const auto geometry = check_attention<c10::SymInt>(kOp, arguments, SeedArgument::kRequired);
    check_attention_gradients(kOp, arguments, gradients, geometry);
    return reduced_gradients(
        arguments, attention_gradient_outputs(arguments, gradients.output_mask, geometry));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<MetaAttention>));
  m.impl("attention_backward", TORCH_FN(attention_backward_kernel<MetaAttention>));
}

}  // namespace torch_ext
