// The kernel of torch_ext::scaled_dot_product_attention, for the drop-in: its override is that
// operator under torch's name, and calls it past the dispatcher, as one entry of a profile.
#pragma once

#include "../optional_tensor.h"

namespace torch_ext {

/// For what autograd, autocast and transforms have seen already. Arguments as the operator's.
at::Tensor composite_scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const OptionalTensor& attn_mask, double dropout_p,
                                                  bool is_causal, std::optional<double> scale,
                                                  bool enable_gqa);

}  // namespace torch_ext
