#include "attention_second_order.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>

#include <cmath>
#include <limits>

#include "../../kernels/counter_rng.h"
#include "attention_checks.h"
#include "attention_signature.h"
#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

using Geometry = AttentionGeometry<c10::SymInt>;

at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a + b : a;
}

at::Tensor row_sum(const at::Tensor& tensor) { return tensor.sum(-1, /*keepdim=*/true); }

at::Tensor transposed(const at::Tensor& tensor) { return tensor.transpose(-2, -1); }

/// The tensors of one call, broadcast to (batch..., query_heads, length, dim) in the accumulating
/// type, and back.
class Expansion {
 public:
  Expansion(const AttentionArguments& arguments, const Geometry& geometry)
      : arguments_(arguments),
        geometry_(geometry),
        type_(accumulate_type(arguments.query->scalar_type())) {}

  at::Tensor query(const at::Tensor& tensor) const {
    return tensor.to(type_).expand_symint(geometry_.query_sizes());
  }
  at::Tensor key(const at::Tensor& tensor) const { return heads(tensor, geometry_.key_sizes()); }
  at::Tensor value(const at::Tensor& tensor) const {
    return heads(tensor, geometry_.value_sizes());
  }
  at::Tensor out(const at::Tensor& tensor) const { return tensor.to(type_); }

  /// A mask may have dimensions of 1 in front of all others.
  at::Tensor mask(const at::Tensor& tensor) const {
    return tensor.to(type_).reshape_symint(mask_sizes());
  }

  /// (heads) as (heads, 1, 1), or (1, 1) without heads.
  at::Tensor sink(const at::Tensor& tensor) const {
    const at::Tensor column = tensor.to(type_).unsqueeze(-1);
    return geometry_.rank >= 3 ? column.unsqueeze(-1) : column;
  }

  /// grad: (batch..., heads, q_len, 1)
  at::Tensor reduce_sink(const at::Tensor& grad) const {
    const at::Tensor& own = *arguments_.sink;
    return at::sum_to(grad, sink(own).sym_sizes())
        .reshape_symint(own.sym_sizes())
        .to(own.scalar_type());
  }

  at::Tensor reduce_query(const at::Tensor& grad) const {
    return at::sum_to(grad, arguments_.query->sym_sizes()).to(arguments_.query->scalar_type());
  }
  at::Tensor reduce_key(const at::Tensor& grad) const {
    return reduce_heads(grad, *arguments_.key);
  }
  at::Tensor reduce_value(const at::Tensor& grad) const {
    return reduce_heads(grad, *arguments_.value);
  }
  at::Tensor reduce_mask(const at::Tensor& grad) const {
    return at::sum_to(grad, mask_sizes())
        .reshape_symint(arguments_.attn_mask->sym_sizes())
        .to(arguments_.attn_mask->scalar_type());
  }

 private:
  bool grouped() const { return geometry_.rank >= 3 && !equal_heads(); }
  bool equal_heads() const {
    return is_zero(geometry_.kv_heads) ||
           TORCH_GUARD_OR_FALSE(geometry_.kv_heads.sym_eq(geometry_.query_heads));
  }

  at::Tensor heads(const at::Tensor& tensor, const Geometry::Sizes& sizes) const {
    const at::Tensor expanded = tensor.to(type_).expand_symint(sizes);
    if (!grouped()) return expanded;
    // (..., kv_heads, group, length, dim)
    Geometry::Sizes grouped_sizes = sizes;
    grouped_sizes.insert(grouped_sizes.end() - 2, geometry_.query_heads / geometry_.kv_heads);
    Geometry::Sizes merged_sizes = sizes;
    *(merged_sizes.end() - 3) = geometry_.query_heads;
    return expanded.unsqueeze(-3).expand_symint(grouped_sizes).reshape_symint(merged_sizes);
  }

  at::Tensor reduce_heads(const at::Tensor& grad, const at::Tensor& input) const {
    at::Tensor sum = grad;
    if (grouped()) {
      const c10::SymIntArrayRef own = grad.sym_sizes();  // (..., query_heads, length, dim)
      Geometry::Sizes sizes(own.begin(), own.end() - 3);
      sizes.push_back(geometry_.kv_heads);
      sizes.push_back(geometry_.query_heads / geometry_.kv_heads);
      sizes.append(own.end() - 2, own.end());
      sum = grad.reshape_symint(sizes).sum(-3);
    }
    return at::sum_to(sum, input.sym_sizes()).to(input.scalar_type());
  }

  c10::SymIntArrayRef mask_sizes() const {
    const auto sizes = arguments_.attn_mask->sym_sizes();
    const auto rank = static_cast<std::size_t>(geometry_.rank);
    return sizes.size() > rank ? sizes.slice(sizes.size() - rank) : sizes;
  }

  const AttentionArguments& arguments_;
  const Geometry& geometry_;
  at::ScalarType type_;
};

/// How far key j lies behind the diagonal of query i: (q_len, kv_len).
at::Tensor diagonal_distance(const AttentionArguments& arguments, const Geometry& geometry) {
  const auto options = arguments.query->options().dtype(at::kLong);
  const at::Tensor rows = at::arange(at::Scalar(geometry.q_len), options).unsqueeze(1);
  const at::Tensor cols = at::arange(at::Scalar(geometry.kv_len), options);
  const c10::SymInt offset =
      arguments.diagonal_offset(arguments.causal_offset, geometry.q_len, geometry.kv_len);
  return cols.sub(rows).sub(at::Scalar(offset));
}

bool is_bound(const c10::SymInt& size) { return TORCH_GUARD_OR_TRUE(size.sym_ge(0)); }

/// What ALiBi adds, broadcastable to the scores.
at::Tensor alibi_bias(const AttentionArguments& arguments, const Geometry& geometry,
                      at::ScalarType type) {
  const at::Tensor distance = diagonal_distance(arguments, geometry).abs().to(type);
  const at::Tensor slopes = arguments.alibi_slopes->to(type);  // broadcastable to (batch..., heads)
  const at::Tensor bias = slopes.unsqueeze(-1).unsqueeze(-1) * -distance;
  return geometry.rank >= 3 ? bias : bias.squeeze(0);
}

/// Pairs that do not take part, broadcastable to the scores; undefined: all do.
at::Tensor excluded_pairs(const AttentionArguments& arguments, const Geometry& geometry) {
  at::Tensor excluded;
  const auto exclude = [&excluded](const at::Tensor& pairs) {
    excluded = excluded.defined() ? excluded.logical_or(pairs) : pairs;
  };
  if (arguments.attn_mask != nullptr && arguments.attn_mask->scalar_type() == at::kBool) {
    exclude(arguments.attn_mask->logical_not());
  }
  if (arguments.key_padding_mask != nullptr) {
    const at::Tensor padding = arguments.key_padding_mask->unsqueeze(-2);  // (batch..., 1, kv_len)
    exclude(geometry.rank >= 3 ? padding.unsqueeze(-3) : padding);
  }
  const bool bounds_right = arguments.is_causal || is_bound(arguments.window_right);
  if (bounds_right || is_bound(arguments.window_left)) {
    const at::Tensor distance = diagonal_distance(arguments, geometry);  // j - (i + offset)
    if (bounds_right) {
      const c10::SymInt right = arguments.is_causal ? c10::SymInt(0) : arguments.window_right;
      exclude(distance.gt(at::Scalar(right)));
    }
    if (is_bound(arguments.window_left)) {
      exclude(distance.lt(at::Scalar(-arguments.window_left)));
    }
  }
  return excluded;
}

double attention_scale(std::optional<double> scale, const c10::SymInt& head_dim) {
  if (scale.has_value()) return *scale;
  const std::int64_t dim = head_dim.guard_int(__FILE__, __LINE__);
  return dim == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(dim));
}

struct Weights {
  at::Tensor keys;  // (batch..., heads, q_len, kv_len)
  at::Tensor sink;  // (batch..., heads, q_len, 1); undefined where there is none
};

/// softmax over keys and the sink; rows that attend to nothing are 0. sink: (heads, 1, 1) or (1,
/// 1).
Weights attention_weights(const at::Tensor& scores, const at::Tensor& excluded,
                          const at::Tensor& sink) {
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  at::Tensor logits = excluded.defined() ? scores.masked_fill(excluded, kMinusInfinity) : scores;
  if (sink.defined()) {
    Geometry::Sizes sizes(logits.sym_sizes().begin(), logits.sym_sizes().end());
    sizes.back() = 1;
    logits = at::cat({logits, sink.expand_symint(sizes)}, -1);
  }
  const at::Tensor empty = logits.eq(kMinusInfinity).all(-1, /*keepdim=*/true);
  const at::Tensor weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0);
  if (!sink.defined()) return {weights, {}};
  const c10::SymInt kv_len = scores.sym_size(-1);
  return {weights.narrow_symint(-1, 0, kv_len), weights.narrow_symint(-1, kv_len, 1)};
}

}  // namespace

// With Z = scale Q K^T, t = tanh(Z / c), S = c t + M + ALiBi (S = Z + ... without a soft cap c), P
// and r the softmax of S's row and the sink z, so that P's row and r sum to 1, D the dropout
// factor, G and l the gradients of out and logsumexp, and C = dS/dZ = 1 - t^2 (or 1), the backward
// pass computes
//   A = G V^T,  B = A D,  delta = rowsum(P B) - l,  T = P (B - delta),  U = T C,
//   dQ = scale U K,  dK = scale U^T Q,  dV = (P D)^T G,  dM = T,  dz = -sum(r delta).
// Below, bar_X is the gradient of X, from bar_dQ, bar_dK, bar_dV, bar_dM and bar_dz. Products
// without a transpose among (q_len, kv_len) matrices are elementwise.
std::vector<at::Tensor> attention_second_order(
    const AttentionArguments& arguments, const AttentionGradients& gradients,
    const std::vector<at::Tensor>& grads, const std::array<bool, 2 + kGradientCount>& needs_grad) {
  const Geometry geometry =
      check_attention<c10::SymInt>("attention_backward", arguments, SeedArgument::kRequired);
  const Expansion expand(arguments, geometry);
  const at::Tensor query = expand.query(*arguments.query);
  const at::Tensor key = expand.key(*arguments.key);
  const at::Tensor value = expand.value(*arguments.value);
  const at::Tensor grad_out = expand.out(*gradients.grad_out);
  const double scale = attention_scale(arguments.scale, geometry.head_dim);

  at::Tensor scores = query.matmul(transposed(key)) * scale;  // Z, then S
  at::Tensor tanh, slope;                                     // t, C
  if (arguments.softcap > 0.0) {
    tanh = (scores / arguments.softcap).tanh();
    slope = 1.0 - tanh.square();
    scores = tanh * arguments.softcap;
  }
  const auto sloped = [&slope](const at::Tensor& x) { return slope.defined() ? x * slope : x; };
  const bool additive = arguments.attn_mask != nullptr && arguments.attn_mask->is_floating_point();
  if (additive) scores = scores + expand.mask(*arguments.attn_mask);
  if (arguments.alibi_slopes != nullptr) {
    scores = scores + alibi_bias(arguments, geometry, scores.scalar_type());
  }
  const bool sinks = arguments.sink != nullptr;
  const auto [weights, sink_weights] =  // P, r
      attention_weights(scores, excluded_pairs(arguments, geometry),
                        sinks ? expand.sink(*arguments.sink) : at::Tensor());

  at::Tensor keep;  // D
  if (arguments.dropout_p > 0.0) {
    keep = call_attention_dropout_mask(*arguments.dropout_seed, arguments.dropout_p,
                                       geometry.score_sizes())
               .to(weights.scalar_type()) *
           dropout_scale(dropout_threshold(arguments.dropout_p));
  }
  const auto dropped = [&keep](const at::Tensor& x) {
    return keep.defined() && x.defined() ? x * keep : x;
  };
  const at::Tensor grad_weights = dropped(grad_out.matmul(transposed(value)));  // B
  at::Tensor delta = row_sum(weights * grad_weights);
  if (gradients.grad_logsumexp != nullptr) {
    delta = delta - gradients.grad_logsumexp->unsqueeze(-1);
  }
  const at::Tensor centred = grad_weights - delta;
  const at::Tensor grad_scores = weights * centred;      // T
  const at::Tensor grad_products = sloped(grad_scores);  // U

  at::Tensor bar_query, bar_key, bar_value, bar_grad_out, bar_grad_logsumexp;
  at::Tensor bar_products, bar_slope, bar_scores_gradient, bar_weights, bar_sink_weights;
  if (grads[kQuery].defined()) {  // dQ = scale U K
    const at::Tensor bar = expand.query(grads[kQuery]) * scale;
    bar_products = bar.matmul(transposed(key));
    bar_key = transposed(grad_products).matmul(bar);
  }
  if (grads[kKey].defined()) {  // dK = scale U^T Q
    const at::Tensor bar = expand.key(grads[kKey]) * scale;
    bar_products = sum_of(bar_products, query.matmul(transposed(bar)));
    bar_query = grad_products.matmul(bar);
  }
  if (bar_products.defined()) {  // U = T C
    bar_scores_gradient = sloped(bar_products);
    if (slope.defined()) bar_slope = bar_products * grad_scores;
  }
  if (grads[kMask].defined()) {  // dM = T
    bar_scores_gradient = sum_of(bar_scores_gradient, expand.mask(grads[kMask]));
  }
  if (grads[kValue].defined()) {  // dV = (P D)^T G
    const at::Tensor bar = expand.value(grads[kValue]);
    bar_weights = dropped(grad_out.matmul(transposed(bar)));
    bar_grad_out = dropped(weights).matmul(bar);
  }
  at::Tensor minus_bar_delta;
  if (bar_scores_gradient.defined()) {  // T = P (B - delta)
    minus_bar_delta = row_sum(weights * bar_scores_gradient);
    bar_weights = sum_of(bar_weights, bar_scores_gradient * centred);
  }
  if (grads[kSink].defined()) {  // dz = -sum(r delta)
    const at::Tensor bar = expand.sink(grads[kSink]);
    bar_sink_weights = -delta * bar;
    minus_bar_delta = sum_of(minus_bar_delta, sink_weights * bar);
  }
  if (minus_bar_delta.defined()) {  // delta = rowsum(P B) - l
    bar_weights = sum_of(bar_weights, -grad_weights * minus_bar_delta);
    bar_grad_logsumexp = minus_bar_delta.squeeze(-1);
    at::Tensor bar_grad_weights = -weights * minus_bar_delta;
    if (bar_scores_gradient.defined()) {
      bar_grad_weights = bar_grad_weights + weights * bar_scores_gradient;
    }
    const at::Tensor bar_product = dropped(bar_grad_weights);  // of A = G V^T
    bar_grad_out = sum_of(bar_grad_out, bar_product.matmul(value));
    bar_value = transposed(bar_product).matmul(grad_out);
  }
  // P, r = softmax(S, z). Something is defined: not all gradients were zero.
  at::Tensor mean = row_sum(weights * bar_weights);
  if (bar_sink_weights.defined()) mean = mean + sink_weights * bar_sink_weights;
  const at::Tensor bar_scores = weights * (bar_weights - mean);
  at::Tensor bar_plain = sloped(bar_scores);  // of Z
  if (bar_slope.defined()) {                  // C = 1 - t^2
    bar_plain = bar_plain - bar_slope * slope * tanh * (2.0 / arguments.softcap);
  }
  bar_query = sum_of(bar_query, bar_plain.matmul(key) * scale);
  bar_key = sum_of(bar_key, transposed(bar_plain).matmul(query) * scale);

  std::vector<at::Tensor> result(2 + kGradientCount);
  if (needs_grad[0]) result[0] = bar_grad_out.to(gradients.grad_out->scalar_type());
  if (needs_grad[1] && bar_grad_logsumexp.defined()) {
    result[1] = bar_grad_logsumexp.to(gradients.grad_logsumexp->scalar_type());
  }
  if (needs_grad[2 + kQuery]) result[2 + kQuery] = expand.reduce_query(bar_query);
  if (needs_grad[2 + kKey]) result[2 + kKey] = expand.reduce_key(bar_key);
  if (needs_grad[2 + kValue] && bar_value.defined()) {
    result[2 + kValue] = expand.reduce_value(bar_value);
  }
  if (needs_grad[2 + kMask] && additive) {
    result[2 + kMask] = expand.reduce_mask(bar_scores.expand_as(scores));
  }
  if (needs_grad[2 + kSink] && sinks) {
    const at::Tensor own = bar_sink_weights.defined() ? bar_sink_weights - mean : -mean;
    result[2 + kSink] = expand.reduce_sink(sink_weights * own);
  }
  return result;
}

}  // namespace torch_ext
