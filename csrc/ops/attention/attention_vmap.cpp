// vmap: the mapped dimension becomes one more batch dimension, in front of all others.
//
// Dropout: a seed that vmap(randomness="different") drew is mapped itself. Its first element seeds
// the folded call, whose samples are different slices of one random stream; the backward pass and
// attention_dropout_mask do likewise and so meet the same mask. A seed that is not mapped
// (randomness="same", or one drawn outside) means the same mask for every sample, for which the
// samples are computed one by one.
#include <ATen/TensorOperators.h>
#include <c10/core/SymbolicShapeMeta.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "attention_checks.h"
#include "attention_signature.h"
#include "stacked_samples.h"
#include "vmap_level.h"

namespace torch_ext {
namespace {

// torch writes attention out as products under vmap.
constexpr bool kContiguous = true;

/// The dimensions behind the mapped one: at least those of heads, length and head_dim, so that what
/// lies in front of them is a batch.
std::int64_t folded_dims(const AttentionGeometry<c10::SymInt>& geometry) {
  return std::max<std::int64_t>(geometry.rank, 3);
}

/// Sample `index` of every tensor that is mapped.
template <typename Call>
auto with_sample(const VmapLevel& level, std::int64_t index, const AttentionArguments& arguments,
                 const Call& call) {
  const AttentionTensors tensors =
      arguments.map_tensors([&](AttentionTensor /*position*/, const at::Tensor& tensor) {
        return level.sample(tensor, index);
      });
  return call(arguments.with_tensors(tensors));
}

/// All samples at once. `expands`: whether inputs that have a gradient are repeated for each
/// sample.
AttentionTensors folded_tensors(const VmapLevel& level, const AttentionArguments& arguments,
                                std::int64_t dims, bool expands) {
  return arguments.map_tensors([&](AttentionTensor position, const at::Tensor& tensor) {
    if (position == kSeed) return level.sample(tensor, 0);
    // Neither has the dimensions of queries and keys, or of head_dim.
    if (position == kPadding || position == kAlibi) return level.fold(tensor, dims - 2);
    if (position == kSink) return tensor;
    return expands || position == kQuery ? level.fold_expanded(tensor, dims)
                                         : level.fold(tensor, dims);
  });
}

/// Whether the samples have to be computed one by one: they share one dropout mask, or have sinks
/// of their own, of which the kernels know one for each head.
bool goes_by_samples(const char* op, const VmapLevel& level, const AttentionArguments& arguments) {
  const bool drops = arguments.dropout_p > 0.0;
  const bool own_masks = drops && level.is_mapped(*arguments.dropout_seed);
  const bool own_sinks = arguments.sink != nullptr && level.is_mapped(*arguments.sink);
  // Sample by sample the masks would be others than attention_dropout_mask() gives.
  TORCH_CHECK_NOT_IMPLEMENTED(!own_masks || !own_sinks, "torch_ext::", op,
                              ": sink takes a tensor that vmap does not map where dropout_p > 0 "
                              "and randomness='different'");
  return own_sinks || (drops && !own_masks);
}

/// (samples, heads): each row's weight of the sink times -delta, summed over all but these.
at::Tensor sink_gradients(const at::Tensor& sink, const AttentionGradients& gradients) {
  const at::Tensor& logsumexp = *gradients.logsumexp;  // (samples, batch..., heads, q_len)
  const at::ScalarType type = logsumexp.scalar_type();
  at::Tensor minus_delta = -(gradients.grad_out->to(type) * gradients.out->to(type)).sum(-1);
  if (gradients.grad_logsumexp != nullptr) minus_delta = minus_delta + *gradients.grad_logsumexp;
  const at::Tensor weights = (sink.to(type).unsqueeze(-1) - logsumexp).exp();
  // A row without keys whose sink is -inf weighs nothing.
  const at::Tensor terms =
      (weights.masked_fill(logsumexp.eq(-std::numeric_limits<double>::infinity()), 0.0) *
       minus_delta)
          .sum(-1);
  const at::Tensor grads =
      terms.dim() == 2 ? terms : terms.flatten(1, -2).sum(1);  // (samples, heads)
  return grads.to(sink.scalar_type());
}

struct VmapAttention {
  static ForwardResult forward(const AttentionArguments& arguments) {
    constexpr const char* kOp = "attention_forward";
    const auto geometry = check_attention<c10::SymInt>(kOp, arguments, SeedArgument::kRequired);
    const VmapLevel level(kOp, arguments.tensors());
    if (goes_by_samples(kOp, level, arguments)) {
      const auto outputs = stack_samples<2>(
          level.batch_size().guard_int(__FILE__, __LINE__), [&](std::int64_t index) {
            return with_sample(level, index, arguments, call_attention_forward);
          });
      return {level.wrap(outputs[0]), level.wrap(outputs[1])};
    }
    const AttentionTensors tensors =
        folded_tensors(level, arguments, folded_dims(geometry), /*expands=*/false);
    AttentionArguments folded = arguments.with_tensors(tensors);
    folded.contiguous = kContiguous;
    const auto [out, logsumexp] = call_attention_forward(folded);
    return {level.wrap(out, geometry.out_sizes()),
            level.wrap(logsumexp, geometry.logsumexp_sizes())};
  }

  static BackwardResult backward(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients) {
    constexpr const char* kOp = "attention_backward";
    const auto geometry = check_attention<c10::SymInt>(kOp, arguments, SeedArgument::kRequired);
    check_attention_gradients(kOp, arguments, gradients, geometry);
    c10::SmallVector<const at::Tensor*, 16> given_tensors{
        gradients.grad_out, gradients.grad_logsumexp, gradients.out, gradients.logsumexp};
    for (const at::Tensor* tensor : arguments.tensors()) given_tensors.push_back(tensor);
    const VmapLevel level(kOp, given_tensors);
    if (goes_by_samples(kOp, level, arguments)) {
      const auto grads = stack_samples<kGradientCount>(
          level.batch_size().guard_int(__FILE__, __LINE__),
          [&](std::int64_t index) { return sample_backward(level, index, arguments, gradients); });
      return {level.wrap(grads[kQuery]), level.wrap(grads[kKey]), level.wrap(grads[kValue]),
              level.wrap(grads[kMask]), level.wrap(grads[kSink])};
    }
    // All inputs expanded: a gradient for each sample, also of what the samples share.
    const std::int64_t dims = folded_dims(geometry);
    const AttentionTensors tensors = folded_tensors(level, arguments, dims, /*expands=*/true);
    AttentionArguments folded = arguments.with_tensors(tensors);
    folded.contiguous = kContiguous;
    at::Tensor grad_sink;  // one for each sample: the operator would sum them
    const auto [grad_query, grad_key, grad_value, grad_mask, none] = with_gradients(
        gradients,
        [&](const at::Tensor& tensor, std::int64_t trailing) {
          return level.fold_expanded(tensor, dims - trailing);
        },
        [&](AttentionGradients of_all) {
          if (of_all.output_mask[kSink]) grad_sink = sink_gradients(*folded.sink, of_all);
          of_all.output_mask[kSink] = false;
          return call_attention_backward(folded, of_all);
        });
    const auto wrap = [&level](const at::Tensor& grad, const at::Tensor* input) {
      return grad.defined() ? level.wrap(grad, input->sym_sizes()) : grad;
    };
    return {wrap(grad_query, arguments.query), wrap(grad_key, arguments.key),
            wrap(grad_value, arguments.value), wrap(grad_mask, arguments.attn_mask),
            wrap(grad_sink, arguments.sink)};
  }

 private:
  /// call() over map(tensor, dimensions fewer than out's) of grad_out, grad_logsumexp, out and
  /// logsumexp.
  template <typename Map, typename Call>
  static BackwardResult with_gradients(const AttentionGradients& gradients, const Map& map,
                                       const Call& call) {
    const at::Tensor grad_out = map(*gradients.grad_out, 0);
    const at::Tensor out = map(*gradients.out, 0);
    const at::Tensor logsumexp = map(*gradients.logsumexp, 1);
    at::Tensor grad_logsumexp;
    if (gradients.grad_logsumexp != nullptr) grad_logsumexp = map(*gradients.grad_logsumexp, 1);
    return call({.grad_out = &grad_out,
                 .grad_logsumexp = given(grad_logsumexp),
                 .out = &out,
                 .logsumexp = &logsumexp,
                 .output_mask = gradients.output_mask});
  }

  static BackwardResult sample_backward(const VmapLevel& level, std::int64_t index,
                                        const AttentionArguments& arguments,
                                        const AttentionGradients& gradients) {
    return with_gradients(
        gradients,
        [&](const at::Tensor& tensor, std::int64_t /*trailing*/) {
          return level.sample(tensor, index);
        },
        [&](const AttentionGradients& of_sample) {
          return with_sample(level, index, arguments, [&](const AttentionArguments& sample) {
            return call_attention_backward(sample, of_sample);
          });
        });
  }
};

at::Tensor attention_dropout_mask_vmap(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes) {
  const VmapLevel level("attention_dropout_mask", {&dropout_seed});
  c10::SymDimVector folded(sizes.begin(), sizes.end());
  folded.insert(folded.begin(), level.batch_size());
  return level.wrap(call_attention_dropout_mask(level.sample(dropout_seed, 0), dropout_p, folded));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<VmapAttention>));
  m.impl("attention_backward", TORCH_FN(attention_backward_kernel<VmapAttention>));
  m.impl("attention_dropout_mask", TORCH_FN(attention_dropout_mask_vmap));
}

}  // namespace torch_ext
