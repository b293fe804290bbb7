#include "attention_call.h"

#include <cmath>

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

}  // namespace

ScoreTransform score_transform(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry) {
  const std::int64_t causal_offset = arguments.causal_offset.guard_int(__FILE__, __LINE__);
  ScoreTransform transform{
      .scale = attention_scale(arguments, geometry.head_dim),
      .window = {.right = arguments.is_causal ? 0 : kUnbounded, .offset = causal_offset}};
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
  return transform;
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

AttentionForwardParams forward_params(const AttentionArguments& arguments,
                                      const AttentionGeometry<std::int64_t>& geometry,
                                      const at::Tensor& out, const at::Tensor* logsumexp) {
  return {.dtype = kernel_scalar_type(arguments.query->scalar_type()),
          .shape = attention_shape(geometry),
          .query = strided_view(*arguments.query),
          .key = strided_view(*arguments.key),
          .value = strided_view(*arguments.value),
          .out = mutable_strided_view(out),
          .logsumexp = logsumexp == nullptr ? nullptr : logsumexp->mutable_data_ptr(),
          .transform = score_transform(arguments, geometry),
          .dropout = attention_dropout(arguments)};
}

}  // namespace torch_ext
