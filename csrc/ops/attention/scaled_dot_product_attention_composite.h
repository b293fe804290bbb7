// The kernel of torch_ext::scaled_dot_product_attention, for the drop-in: its override is that
// operator under torch's name, and calls it past the dispatcher, as one entry of a profile.
#pragma once

#include "attention_arguments.h"

namespace torch_ext {

/// For what autograd, autocast and transforms have seen already.
at::Tensor composite_scaled_dot_product_attention(const AttentionArguments& arguments);

}  // namespace torch_ext
