// Slow oracles in double precision, one (query, key) pair at a time: what the fast kernels are
// tested against. Same params, every dtype and feature.
#pragma once

#include "../attention_params.h"

namespace torch_ext {

void attention_forward_reference(const AttentionForwardParams& params);
void attention_backward_reference(const AttentionBackwardParams& params);

}  // namespace torch_ext
