// What the varlen operators return, not yet filled.
#pragma once

#include "varlen_arguments.h"

namespace torch_ext {

/// out (total_q, heads, value_dim) of query's dtype, in query's memory order; logsumexp (heads,
/// total_q), float, or double for doubles.
VarlenForwardResult varlen_outputs(const VarlenArguments& arguments, const VarlenSizes& sizes);

/// Like query, key, value and sink, where output_mask asks for them; contiguous.
VarlenBackwardResult varlen_gradient_outputs(const VarlenArguments& arguments,
                                             std::array<bool, 4> output_mask);

}  // namespace torch_ext
