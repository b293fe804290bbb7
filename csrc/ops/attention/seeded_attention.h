// attention_forward() for callers without a seed.
#pragma once

#include "attention_arguments.h"

namespace torch_ext {

/// Checks everything, once; then, where dropout_p > 0 and no seed is given, draws one from torch's
/// generator; then computes attention_forward(). A refused call leaves the generator where it was.
/// Every way to attention_forward() that draws a seed comes through here; self_attention(), whose
/// arguments are others, does the same in the same order.
///
/// A plain CPU call (plain_dispatch.h) goes past the dispatcher. `wants_logsumexp`: false lets an
/// inference call leave logsumexp undefined.
ForwardResult seeded_attention_forward(const char* op, AttentionArguments arguments,
                                       bool wants_logsumexp);

}  // namespace torch_ext
