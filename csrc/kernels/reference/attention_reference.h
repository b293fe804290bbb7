// Slow oracles in double precision, one (query, key) pair at a time: what the fast kernels are
// tested against. Same params, every dtype and feature.
#pragma once

#include "../attention_params.h"

namespace torch_ext {

void attention_forward_reference(const AttentionForwardParams& params);
void attention_backward_reference(const AttentionBackwardParams& params);

/// How the products of a score are added up.
enum class DotOrder { kFirstToLast, kLastToFirst };

/// The same formula step by step in the type that kernels accumulate in: how far from the
/// reference rounding alone may lead.
void attention_forward_written_out(const AttentionForwardParams& params, DotOrder order);
void attention_backward_written_out(const AttentionBackwardParams& params, DotOrder order);

}  // namespace torch_ext
