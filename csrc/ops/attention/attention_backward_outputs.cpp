#include "attention_backward_outputs.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "attention_layout.h"
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

at::Tensor empty_of(std::initializer_list<std::int64_t> sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

at::Tensor empty_of(std::initializer_list<c10::SymInt> sizes, const at::TensorOptions& options) {
  return at::empty_symint(sizes, options);
}

at::Tensor reduced(const at::Tensor& grad, const at::Tensor& input) {
  if (!grad.defined()) return grad;
  const at::ScalarType type = input.scalar_type();
  // A sum is contiguous; the sum of a transpose (grad_key, see attention_layout.h) stays one.
  if (grad.dim() >= 3 && input.dim() >= 3 && is_one(grad.sym_stride(-2)) &&
      !is_one(grad.sym_stride(-1))) {
    const at::Tensor sum = at::sum_to(grad.transpose(-2, -1), input.transpose(-2, -1).sym_sizes());
    return sum.to(type).transpose(-2, -1);
  }
  return at::sum_to(grad, input.sym_sizes()).to(type);
}

}  // namespace

template <typename Int>
AttentionGradientOutputs attention_gradient_outputs(const AttentionArguments& arguments,
                                                    GradientSet output_mask,
                                                    const AttentionGeometry<Int>& geometry) {
  const at::Tensor& query = *arguments.query;
  const at::Tensor& key = *arguments.key;
  const at::Tensor& value = *arguments.value;
  // What is summed over a broadcast is rounded once, after that.
  const bool all_same = same_sizes<Int>(sizes_of<Int>(query), geometry.query_sizes()) &&
                        same_sizes<Int>(sizes_of<Int>(key), geometry.key_sizes()) &&
                        same_sizes<Int>(sizes_of<Int>(value), geometry.value_sizes());
  const at::ScalarType type = all_same ? query.scalar_type() : accumulate_type(query.scalar_type());
  const auto gradient = [&](AttentionTensor input) {
    return attention_gradient(arguments, geometry, input, type);
  };
  AttentionGradientOutputs outputs;
  if (output_mask[kQuery]) outputs.query = gradient(kQuery);
  if (output_mask[kKey]) outputs.key = gradient(kKey);
  if (output_mask[kValue]) outputs.value = gradient(kValue);
  if (output_mask[kMask]) {
    const at::Tensor& mask = *arguments.attn_mask;
    outputs.mask =
        at::empty_like(mask, mask.options().dtype(accumulate_type(arguments.query->scalar_type())),
                       at::MemoryFormat::Contiguous);
  }
  if (output_mask[kSink]) {
    Int batch = 1;
    for (const Int& size : geometry.batch_sizes) batch = batch * size;
    outputs.sink = empty_of({batch, geometry.query_heads},
                            query.options().dtype(accumulate_type(query.scalar_type())));
  }
  return outputs;
}

template AttentionGradientOutputs attention_gradient_outputs(
    const AttentionArguments&, GradientSet, const AttentionGeometry<std::int64_t>&);
template AttentionGradientOutputs attention_gradient_outputs(const AttentionArguments&, GradientSet,
                                                             const AttentionGeometry<c10::SymInt>&);

at::Tensor mask_gradient(const AttentionArguments& arguments,
                         const AttentionGradientOutputs& outputs) {
  if (!outputs.mask.defined()) return outputs.mask;
  return outputs.mask.to(arguments.attn_mask->scalar_type());
}

at::Tensor sink_gradient(const AttentionArguments& arguments,
                         const AttentionGradientOutputs& outputs) {
  if (!outputs.sink.defined()) return outputs.sink;
  return outputs.sink.sum(0).to(arguments.sink->scalar_type());
}

BackwardResult reduced_gradients(const AttentionArguments& arguments,
                                 const AttentionGradientOutputs& outputs) {
  return {reduced(outputs.query, *arguments.query), reduced(outputs.key, *arguments.key),
          reduced(outputs.value, *arguments.value), mask_gradient(arguments, outputs),
          sink_gradient(arguments, outputs)};
}

}  // namespace torch_ext
