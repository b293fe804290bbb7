// vmap: the mapped dimension becomes one more batch dimension, in front of all others.
//
// Dropout: a seed that vmap(randomness="different") drew is mapped itself. Its first element seeds
// the folded call, whose samples are different slices of one random stream; the backward pass and
// attention_dropout_mask do likewise and so meet the same mask. A seed that is not mapped
// (randomness="same", or one drawn outside) means the same mask for every sample, for which the
// samples are computed one by one.
#include <ATen/ops/stack.h>
#include <c10/core/SymbolicShapeMeta.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "attention_checks.h"
#include "attention_operators.h"
#include "vmap_level.h"

namespace torch_ext {
namespace {

/// Calls `one(index)`, which returns a std::tuple of `kOutputs` tensors, for each sample, and
/// stacks.
template <std::size_t kOutputs, typename One>
std::array<at::Tensor, kOutputs> stack_samples(std::int64_t count, const One& one) {
  TORCH_CHECK(count > 0, "torch_ext: vmap with dropout takes at least one sample, got none");
  std::array<std::vector<at::Tensor>, kOutputs> samples;
  for (std::int64_t index = 0; index < count; ++index) {
    std::apply(
        [&samples](const auto&... outputs) {
          std::size_t position = 0;
          (samples[position++].push_back(outputs), ...);
        },
        one(index));
  }
  std::array<at::Tensor, kOutputs> stacked;
  for (std::size_t output = 0; output < kOutputs; ++output) {
    if (samples[output].front().defined()) stacked[output] = at::stack(samples[output], 0);
  }
  return stacked;
}

// torch writes attention out as products under vmap.
constexpr bool kContiguous = true;

/// The dimensions behind the mapped one: at least those of heads, length and head_dim, so that what
/// lies in front of them is a batch.
std::int64_t folded_dims(const AttentionGeometry<c10::SymInt>& geometry) {
  return std::max<std::int64_t>(geometry.rank, 3);
}

OptionalTensor first_seed(const VmapLevel& level, const OptionalTensor& seed) {
  return level.sample(seed, 0);
}

ForwardResult attention_forward_vmap(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const OptionalTensor& attn_mask,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     bool enable_gqa, c10::SymInt causal_offset,
                                     const OptionalTensor& key_padding_mask,
                                     const OptionalTensor& dropout_seed, bool contiguous) {
  constexpr const char* kOp = "attention_forward";
  const auto geometry = check_attention<c10::SymInt>(kOp,
                                                     {.query = query,
                                                      .key = key,
                                                      .value = value,
                                                      .attn_mask = given(attn_mask),
                                                      .dropout_p = dropout_p,
                                                      .is_causal = is_causal,
                                                      .scale = scale,
                                                      .enable_gqa = enable_gqa,
                                                      .key_padding_mask = given(key_padding_mask),
                                                      .dropout_seed = given(dropout_seed)},
                                                     SeedArgument::kRequired);
  const VmapLevel level(
      kOp, {&query, &key, &value, given(attn_mask), given(key_padding_mask), given(dropout_seed)});
  if (dropout_p > 0.0 && !level.is_mapped(*dropout_seed)) {
    const auto outputs =
        stack_samples<2>(level.batch_size().guard_int(__FILE__, __LINE__), [&](std::int64_t index) {
          return call_attention_forward(
              level.sample(query, index), level.sample(key, index), level.sample(value, index),
              level.sample(attn_mask, index), dropout_p, is_causal, scale, enable_gqa,
              causal_offset, level.sample(key_padding_mask, index), dropout_seed, contiguous);
        });
    return {level.wrap(outputs[0]), level.wrap(outputs[1])};
  }
  const std::int64_t dims = folded_dims(geometry);
  const auto [out, logsumexp] = call_attention_forward(
      level.fold_expanded(query, dims), level.fold(key, dims), level.fold(value, dims),
      level.fold(attn_mask, dims), dropout_p, is_causal, scale, enable_gqa, causal_offset,
      level.fold(key_padding_mask, dims - 2), first_seed(level, dropout_seed), kContiguous);
  return {level.wrap(out, geometry.out_sizes()), level.wrap(logsumexp, geometry.logsumexp_sizes())};
}

BackwardResult attention_backward_vmap(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& logsumexp, const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    std::optional<double> scale, bool enable_gqa, c10::SymInt causal_offset,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 4> output_mask, bool contiguous) {
  constexpr const char* kOp = "attention_backward";
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed)};
  const auto geometry = check_attention<c10::SymInt>(kOp, arguments, SeedArgument::kRequired);
  check_attention_gradients(kOp, arguments,
                            {.grad_out = grad_out,
                             .grad_logsumexp = given(grad_logsumexp),
                             .out = out,
                             .logsumexp = logsumexp,
                             .output_mask = output_mask},
                            geometry);
  const VmapLevel level(kOp,
                        {&grad_out, given(grad_logsumexp), &query, &key, &value, &out, &logsumexp,
                         given(attn_mask), given(key_padding_mask), given(dropout_seed)});
  if (dropout_p > 0.0 && !level.is_mapped(*dropout_seed)) {
    const auto grads =
        stack_samples<4>(level.batch_size().guard_int(__FILE__, __LINE__), [&](std::int64_t index) {
          return call_attention_backward(
              level.sample(grad_out, index), level.sample(grad_logsumexp, index),
              level.sample(query, index), level.sample(key, index), level.sample(value, index),
              level.sample(out, index), level.sample(logsumexp, index),
              level.sample(attn_mask, index), dropout_p, is_causal, scale, enable_gqa,
              causal_offset, level.sample(key_padding_mask, index), dropout_seed, output_mask,
              contiguous);
        });
    return {level.wrap(grads[0]), level.wrap(grads[1]), level.wrap(grads[2]), level.wrap(grads[3])};
  }
  // All inputs expanded: a gradient for each sample, also of what the samples share.
  const std::int64_t dims = folded_dims(geometry);
  const auto [grad_query, grad_key, grad_value, grad_mask] = call_attention_backward(
      level.fold_expanded(grad_out, dims), level.fold_expanded(grad_logsumexp, dims - 1),
      level.fold_expanded(query, dims), level.fold_expanded(key, dims),
      level.fold_expanded(value, dims), level.fold_expanded(out, dims),
      level.fold_expanded(logsumexp, dims - 1), level.fold_expanded(attn_mask, dims), dropout_p,
      is_causal, scale, enable_gqa, causal_offset, level.fold(key_padding_mask, dims - 2),
      first_seed(level, dropout_seed), output_mask, kContiguous);
  return {level.wrap(grad_query, query.sym_sizes()), level.wrap(grad_key, key.sym_sizes()),
          level.wrap(grad_value, value.sym_sizes()),
          output_mask[3] ? level.wrap(grad_mask, attn_mask->sym_sizes()) : grad_mask};
}

at::Tensor attention_dropout_mask_vmap(const at::Tensor& dropout_seed, double dropout_p,
                                       c10::SymIntArrayRef sizes) {
  const VmapLevel level("attention_dropout_mask", {&dropout_seed});
  c10::SymDimVector folded(sizes.begin(), sizes.end());
  folded.insert(folded.begin(), level.batch_size());
  return level.wrap(call_attention_dropout_mask(level.sample(dropout_seed, 0), dropout_p, folded));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_vmap));
  m.impl("attention_backward", TORCH_FN(attention_backward_vmap));
  m.impl("attention_dropout_mask", TORCH_FN(attention_dropout_mask_vmap));
}

}  // namespace torch_ext
