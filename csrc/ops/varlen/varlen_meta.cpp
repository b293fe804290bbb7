// Shapes, strides and dtypes of the varlen operators without data: the same checks as on the
// devices, but for those of the integers that cu_seq_q, cu_seq_k and seqused_k hold.
#include <torch/library.h>

#include "varlen_checks.h"
#include "varlen_outputs.h"
#include "varlen_signature.h"

namespace torch_ext {

namespace {

struct Meta {
  static VarlenForwardResult forward(const VarlenArguments& arguments) {
    return varlen_outputs(
        arguments, check_varlen("varlen_attention_forward", arguments, SeedArgument::kRequired));
  }
  static VarlenBackwardResult backward(const VarlenArguments& arguments,
                                       const VarlenGradients& gradients) {
    constexpr const char* kOp = "varlen_attention_backward";
    check_varlen_gradients(kOp, arguments, gradients,
                           check_varlen(kOp, arguments, SeedArgument::kRequired));
    return varlen_gradient_outputs(arguments, gradients.output_mask);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("varlen_attention_forward", TORCH_FN(VarlenEntries<Meta>::forward));
  m.impl("varlen_attention_backward", TORCH_FN(VarlenEntries<Meta>::backward));
}

}  // namespace torch_ext
