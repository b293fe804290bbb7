// How gradients are allocated and brought to the shapes of the inputs, alike on every device and
// for symbolic shapes.
#pragma once

#include "attention_arguments.h"

namespace torch_ext {

/// Where the kernels write the gradients. Undefined: not wanted. All have the shapes that the
/// inputs broadcast to, and the accumulating type where one of the three is to be summed over that;
/// but `mask`, which has the mask's own shape, and `sink`, which is (batch, query_heads),
/// contiguous, with all batch dimensions in one: these are always of the accumulating type.
struct AttentionGradientOutputs {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::Tensor mask;
  at::Tensor sink;

  /// The gradients of query, key and value are of the accumulating type, not of `type`.
  bool unrounded(at::ScalarType type) const {
    for (const at::Tensor* grad : {&query, &key, &value}) {
      if (grad->defined()) return grad->scalar_type() != type;
    }
    return false;
  }
};

/// In the memory order of attention_layout.h; that of the mask is contiguous, as torch's.
template <typename Int>
AttentionGradientOutputs attention_gradient_outputs(const AttentionArguments& arguments,
                                                    GradientSet output_mask,
                                                    const AttentionGeometry<Int>& geometry);

extern template AttentionGradientOutputs attention_gradient_outputs(
    const AttentionArguments&, GradientSet, const AttentionGeometry<std::int64_t>&);
extern template AttentionGradientOutputs attention_gradient_outputs(
    const AttentionArguments&, GradientSet, const AttentionGeometry<c10::SymInt>&);

/// outputs.mask in the mask's dtype.
at::Tensor mask_gradient(const AttentionArguments& arguments,
                         const AttentionGradientOutputs& outputs);

/// outputs.sink summed over the batch, in the sink's dtype.
at::Tensor sink_gradient(const AttentionArguments& arguments,
                         const AttentionGradientOutputs& outputs);

/// Sums over what the inputs broadcast, and brings the mask's gradient to its dtype.
BackwardResult reduced_gradients(const AttentionArguments& arguments,
                                 const AttentionGradientOutputs& outputs);

}  // namespace torch_ext
