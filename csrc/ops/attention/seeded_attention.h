// attention_forward() for callers without a seed.
#pragma once

#include "attention_arguments.h"
#include "attention_operators.h"

namespace torch_ext {

/// Checks everything; then, where dropout_p > 0 and no seed is given, draws one from torch's
/// generator; then calls attention_forward(). A refused call leaves the generator where it was.
/// Every way to attention_forward() that draws a seed comes through here; self_attention(), whose
/// arguments are others, does the same in the same order.
ForwardResult seeded_attention_forward(const char* op, const AttentionArguments& arguments,
                                       const c10::SymInt& causal_offset);

}  // namespace torch_ext
