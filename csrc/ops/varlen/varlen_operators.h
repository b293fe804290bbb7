// The operators of this folder as typed functions. Each call goes through the dispatcher; the
// handle is looked up once per process.
#pragma once

#include "varlen_arguments.h"

namespace torch_ext {

VarlenForwardResult call_varlen_attention_forward(const VarlenArguments& arguments);
VarlenBackwardResult call_varlen_attention_backward(const VarlenArguments& arguments,
                                                    const VarlenGradients& gradients);

/// Draws the seed where dropout_p > 0 and none is given, after the checks.
VarlenForwardResult seeded_varlen_attention(VarlenArguments arguments);

}  // namespace torch_ext
