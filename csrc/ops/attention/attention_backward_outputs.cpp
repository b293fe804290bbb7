#include "attention_backward_outputs.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

template <typename Int>
bool same_sizes(c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  if (a.size() != b.size()) return false;
  for (std::size_t dim = 0; dim < a.size(); ++dim) {
    // The sizes broadcast: they differ only where the first is 1.
    if (is_one(a[dim]) != is_one(b[dim])) return false;
  }
  return true;
}

at::Tensor empty_of(c10::ArrayRef<std::int64_t> sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

at::Tensor empty_of(c10::ArrayRef<c10::SymInt> sizes, const at::TensorOptions& options) {
  return at::empty_symint(sizes, options);
}

template <typename Int, typename Sizes>
at::Tensor gradient_output(const at::Tensor& input, const Sizes& sizes, at::ScalarType type) {
  const at::TensorOptions options = input.options().dtype(type);
  if (same_sizes<Int>(sizes_of<Int>(input), sizes)) return at::empty_like(input, options);
  return empty_of(c10::ArrayRef<Int>(sizes), options);
}

at::Tensor reduced(const at::Tensor& grad, const at::Tensor& input) {
  if (!grad.defined()) return grad;
  return at::sum_to(grad, input.sym_sizes()).to(input.scalar_type());
}

}  // namespace

template <typename Int>
AttentionGradientOutputs attention_gradient_outputs(const AttentionArguments& arguments,
                                                    std::array<bool, 4> output_mask,
                                                    const AttentionGeometry<Int>& geometry) {
  const at::Tensor& query = arguments.query;
  const at::Tensor& key = arguments.key;
  const at::Tensor& value = arguments.value;
  // What is summed over a broadcast is rounded once, after that.
  const bool all_same = same_sizes<Int>(sizes_of<Int>(query), geometry.query_sizes()) &&
                        same_sizes<Int>(sizes_of<Int>(key), geometry.key_sizes()) &&
                        same_sizes<Int>(sizes_of<Int>(value), geometry.value_sizes());
  const at::ScalarType type = all_same ? query.scalar_type() : accumulate_type(query.scalar_type());
  AttentionGradientOutputs outputs;
  if (output_mask[0]) outputs.query = gradient_output<Int>(query, geometry.query_sizes(), type);
  if (output_mask[1]) outputs.key = gradient_output<Int>(key, geometry.key_sizes(), type);
  if (output_mask[2]) outputs.value = gradient_output<Int>(value, geometry.value_sizes(), type);
  if (output_mask[3]) {
    const at::Tensor& mask = *arguments.attn_mask;
    outputs.mask =
        at::empty_like(mask, mask.options().dtype(accumulate_type(arguments.query.scalar_type())));
  }
  return outputs;
}

template AttentionGradientOutputs attention_gradient_outputs(
    const AttentionArguments&, std::array<bool, 4>, const AttentionGeometry<std::int64_t>&);
template AttentionGradientOutputs attention_gradient_outputs(const AttentionArguments&,
                                                             std::array<bool, 4>,
                                                             const AttentionGeometry<c10::SymInt>&);

at::Tensor mask_gradient(const AttentionArguments& arguments,
                         const AttentionGradientOutputs& outputs) {
  if (!outputs.mask.defined()) return outputs.mask;
  return outputs.mask.to(arguments.attn_mask->scalar_type());
}

BackwardResult reduced_gradients(const AttentionArguments& arguments,
                                 const AttentionGradientOutputs& outputs) {
  return {reduced(outputs.query, arguments.query), reduced(outputs.key, arguments.key),
          reduced(outputs.value, arguments.value), mask_gradient(arguments, outputs)};
}

}  // namespace torch_ext
