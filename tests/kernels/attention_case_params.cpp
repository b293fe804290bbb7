// What kernels are told of a problem, and which of its pairs take part.
#include <limits>

#include "attention_case.h"

namespace torch_ext::testing {

KeyWindow window_of(const AttentionCase& spec) {
  return {.left = spec.window_left,
          .right = spec.is_causal ? 0 : spec.window_right,
          .offset = spec.causal_offset};
}

namespace {

ScoreTransform make_transform(const AttentionProblem& problem) {
  ScoreTransform transform{.scale = problem.scale,
                           .softcap = problem.spec.softcap,
                           .mask = {.kind = problem.spec.mask.kind,
                                    .dtype = problem.mask.type(),
                                    .view = problem.mask.const_view()},
                           .key_padding = problem.key_padding.const_view(),
                           .window = window_of(problem.spec),
                           .sink = problem.sink.const_view().data};
  if (problem.alibi) {
    const ConstStridedView view = problem.alibi.const_view();
    transform.alibi = {static_cast<const float*>(view.data), view.batch_strides, view.head_stride};
  }
  // Only batch_strides and col_stride may be used.
  transform.key_padding.head_stride = std::int64_t{1} << 40;
  transform.key_padding.row_stride = std::int64_t{1} << 40;
  return transform;
}

AttentionDropout make_dropout(const AttentionCase& spec) {
  return {.probability = spec.dropout, .seed = spec.dropout > 0.0 ? &spec.seed : nullptr};
}

}  // namespace

AttentionForwardParams AttentionProblem::forward_params() const {
  return {.dtype = spec.dtype,
          .shape = shape,
          .query = query.const_view(),
          .key = key.const_view(),
          .value = value.const_view(),
          .out = out.view(),
          .logsumexp = logsumexp.view().data,
          .transform = make_transform(*this),
          .dropout = make_dropout(spec)};
}

AttentionBackwardParams AttentionProblem::backward_params() const {
  return {.dtype = spec.dtype,
          .shape = shape,
          .query = query.const_view(),
          .key = key.const_view(),
          .value = value.const_view(),
          .out = out.const_view(),
          .grad_out = grad_out.const_view(),
          .logsumexp = logsumexp.view().data,
          .grad_logsumexp = grad_logsumexp.view().data,
          .unrounded_grads = spec.unrounded_grads,
          .grad_query = grad_query.view(),
          .grad_key = grad_key.view(),
          .grad_value = grad_value.view(),
          .grad_mask = grad_mask.view(),
          .grad_sink = grad_sink.view().data,
          .transform = make_transform(*this),
          .dropout = make_dropout(spec)};
}

bool AttentionProblem::attends(std::int64_t batch, std::int64_t head, std::int64_t row,
                               std::int64_t col) const {
  const std::int64_t beyond = col - row - spec.causal_offset;  // the diagonal
  if (spec.is_causal && beyond > 0) return false;
  if (spec.window_right != kUnbounded && beyond > spec.window_right) return false;
  if (spec.window_left != kUnbounded && -beyond > spec.window_left) return false;
  if (key_padding && key_padding.get(batch, 0, 0, col) != 0.0) return false;
  if (spec.mask.kind == AttentionMaskKind::kBoolean) return mask.get(batch, head, row, col) != 0.0;
  if (spec.mask.kind == AttentionMaskKind::kAdditive) {
    return mask.get(batch, head, row, col) != -std::numeric_limits<double>::infinity();
  }
  return true;
}

std::int64_t AttentionProblem::count_attended_pairs() const {
  std::int64_t count = 0;
  for (std::int64_t batch = 0; batch < shape.batch(); ++batch) {
    for (std::int64_t head = 0; head < shape.query_heads; ++head) {
      for (std::int64_t row = 0; row < shape.q_len; ++row) {
        for (std::int64_t col = 0; col < shape.kv_len; ++col) {
          count += attends(batch, head, row, col) ? 1 : 0;
        }
      }
    }
  }
  return count;
}

}  // namespace torch_ext::testing
