#include "attention_call.h"

#include <cmath>
#include <limits>

#include "../tensor_params.h"

namespace torch_ext {

AttentionShape attention_shape(const AttentionGeometry<std::int64_t>& geometry) {
  return {.batch_sizes = geometry.batch_sizes,
          .query_heads = geometry.query_heads,
          .kv_heads = geometry.kv_heads,
          .q_len = geometry.q_len,
          .kv_len = geometry.kv_len,
          .head_dim = geometry.head_dim,
          .value_dim = geometry.value_dim};
}

namespace {

double attention_scale(const AttentionArguments& arguments, std::int64_t head_dim) {
  if (arguments.scale.has_value()) return *arguments.scale;
  // Without a head_dim all scores are 0, and must not become 0 * inf.
  return head_dim == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

std::int64_t bound(const c10::SymInt& size) {
  const std::int64_t known = size.guard_int(__FILE__, __LINE__);
  return known < 0 ? kUnbounded : known;
}

KeyWindow key_window(const AttentionArguments& arguments,
                     const AttentionGeometry<std::int64_t>& geometry) {
  // Far enough from any key for whatever window, and short of where sums of it would overflow.
  constexpr std::int64_t kFarthest = std::int64_t{1} << 53;
  const std::int64_t offset = arguments.diagonal_offset(
      std::clamp(arguments.causal_offset.guard_int(__FILE__, __LINE__), -kFarthest, kFarthest),
      geometry.q_len, geometry.kv_len);
  return {.left = bound(arguments.window_left),
          .right = arguments.is_causal ? 0 : bound(arguments.window_right),
          .offset = offset};
}

/// slopes: broadcastable to (batch..., heads).
AlibiSlopes alibi(const at::Tensor& slopes) {
  AlibiSlopes view{.data = slopes.const_data_ptr<float>()};
  view.head_stride = broadcast_stride(slopes, 0);
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    view.batch_strides[kMaxBatchDims - 1 - dim] = broadcast_stride(slopes, 1 + dim);
  }
  return view;
}

}  // namespace

ScoreTransform score_transform(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& sink) {
  ScoreTransform transform{.scale = attention_scale(arguments, geometry.head_dim),
                           .softcap = arguments.softcap,
                           .window = key_window(arguments, geometry)};
  if (arguments.attn_mask != nullptr) {
    AttentionMask& mask = transform.mask;
    mask.dtype = kernel_scalar_type(arguments.attn_mask->scalar_type());
    mask.kind = mask.dtype == ScalarType::kBool ? AttentionMaskKind::kBoolean
                                                : AttentionMaskKind::kAdditive;
    mask.view = strided_view(*arguments.attn_mask);
  }
  if (arguments.key_padding_mask != nullptr) {
    transform.key_padding = padding_view(*arguments.key_padding_mask);
  }
  if (arguments.alibi_slopes != nullptr) transform.alibi = alibi(*arguments.alibi_slopes);
  if (sink.defined()) transform.sink = sink.const_data_ptr();
  return transform;
}

at::Tensor kernel_sink(const AttentionArguments& arguments) {
  if (arguments.sink == nullptr) return {};
  return arguments.sink->to(accumulate_type(arguments.query->scalar_type())).contiguous();
}

AttentionDropout attention_dropout(const AttentionArguments& arguments) {
  if (arguments.dropout_p == 0.0) return {};
  return {.probability = arguments.dropout_p,
          .seed = arguments.dropout_seed->const_data_ptr<std::int64_t>()};
}

bool has_no_scores(const AttentionGeometry<std::int64_t>& geometry) {
  return geometry.q_len == 0 || geometry.kv_len == 0 || geometry.query_heads == 0 ||
         attention_shape(geometry).batch() == 0;
}

void write_no_scores(const AttentionArguments& arguments, const at::Tensor& out,
                     const at::Tensor* logsumexp) {
  out.zero_();
  if (logsumexp == nullptr) return;
  if (arguments.sink == nullptr) {
    logsumexp->fill_(-std::numeric_limits<double>::infinity());
  } else {
    logsumexp->copy_(logsumexp->dim() == 1 ? *arguments.sink : arguments.sink->unsqueeze(-1));
  }
}

void write_no_score_gradients(const AttentionGradients& gradients,
                              const AttentionGeometry<std::int64_t>& geometry,
                              const AttentionGradientOutputs& outputs) {
  for (const at::Tensor* grad :
       {&outputs.query, &outputs.key, &outputs.value, &outputs.mask, &outputs.sink}) {
    if (grad->defined()) grad->zero_();
  }
  if (outputs.sink.defined() && gradients.grad_logsumexp != nullptr) {
    const AttentionShape shape = attention_shape(geometry);
    outputs.sink.copy_(
        gradients.grad_logsumexp->reshape({shape.batch(), shape.query_heads, shape.q_len}).sum(-1));
  }
}

AttentionForwardParams forward_params(const AttentionArguments& arguments,
                                      const AttentionGeometry<std::int64_t>& geometry,
                                      const at::Tensor& sink, const at::Tensor& out,
                                      const at::Tensor* logsumexp) {
  return {.dtype = kernel_scalar_type(arguments.query->scalar_type()),
          .shape = attention_shape(geometry),
          .query = strided_view(*arguments.query),
          .key = strided_view(*arguments.key),
          .value = strided_view(*arguments.value),
          .out = mutable_strided_view(out),
          .logsumexp = logsumexp == nullptr ? nullptr : logsumexp->mutable_data_ptr(),
          .transform = score_transform(arguments, geometry, sink),
          .dropout = attention_dropout(arguments)};
}

}  // namespace torch_ext
