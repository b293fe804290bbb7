// Argument checks of the varlen operators. They raise naming the operator, the argument, what it
// takes and what it got.
#pragma once

#include "../attention/attention_checks.h"
#include "varlen_arguments.h"

namespace torch_ext {

/// Kinds, shapes, dtypes and options: everything but what the integer tensors hold.
VarlenSizes check_varlen(const char* op, const VarlenArguments& arguments, SeedArgument seed);

void check_varlen_gradients(const char* op, const VarlenArguments& arguments,
                            const VarlenGradients& gradients, const VarlenSizes& sizes);

}  // namespace torch_ext
