#include "attention_reference.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../counter_rng.h"
#include "dense_slice.h"
#include "element_access.h"

namespace torch_ext {
namespace {

using reference::DenseSlice;
using reference::load_element;
using reference::store_element;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ScalarType logsumexp_type(ScalarType dtype) {
  return dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

/// What one query row does with each key: the normalised weight before dropout, and the factor that
/// dropout multiplies it by.
template <typename T>
struct RowWeights {
  std::vector<T> weight;       // (kv_len)
  std::vector<T> keep;         // (kv_len)
  std::vector<bool> attended;  // (kv_len): false = the pair takes no part, whatever its values
  std::vector<T> cap_slope;    // (kv_len): of the soft cap
  T sink_weight = 0;
  T logsumexp = -kInfinity;
};

/// The score that masks add to, or -inf where they exclude the pair.
class PairMask {
 public:
  PairMask(const ScoreTransform& transform, ScalarType sink_type, const AttentionShape& shape,
           std::int64_t batch, std::int64_t head)
      : transform_(transform),
        kv_len_(shape.kv_len),
        mask_base_(slice_offset(transform.mask.view, shape.batch_sizes, batch, head)),
        padding_base_(slice_offset(transform.key_padding, shape.batch_sizes, batch, 0)) {
    const AlibiSlopes& alibi = transform.alibi;
    if (alibi.data != nullptr) {
      const ConstStridedView view{alibi.data, alibi.batch_strides, alibi.head_stride};
      alibi_slope_ = alibi.data[slice_offset(view, shape.batch_sizes, batch, head)];
    }
    if (transform.sink != nullptr) sink_ = load_element(transform.sink, head, sink_type);
  }

  bool excludes(std::int64_t query, std::int64_t key) const {
    const Range keys = keys_of(transform_.window, query, kv_len_);
    if (key < keys.begin || key >= keys.end) return true;
    if (transform_.key_padding.data != nullptr &&
        load_element(transform_.key_padding.data,
                     padding_base_ + key * transform_.key_padding.col_stride,
                     ScalarType::kBool) != 0.0) {
      return true;
    }
    return transform_.mask.kind == AttentionMaskKind::kBoolean &&
           load_element(transform_.mask.view.data, mask_offset(query, key), ScalarType::kBool) ==
               0.0;
  }

  double bias(std::int64_t query, std::int64_t key) const {
    if (transform_.mask.kind != AttentionMaskKind::kAdditive) return 0.0;
    return load_element(transform_.mask.view.data, mask_offset(query, key), transform_.mask.dtype);
  }

  double alibi(std::int64_t query, std::int64_t key) const {
    const double distance = static_cast<double>(query + transform_.window.offset - key);
    return alibi_slope_ == 0.0 ? 0.0 : -alibi_slope_ * std::fabs(distance);
  }

  /// -inf: there is none.
  double sink() const { return sink_; }

 private:
  std::int64_t mask_offset(std::int64_t query, std::int64_t key) const {
    return mask_base_ + query * transform_.mask.view.row_stride +
           key * transform_.mask.view.col_stride;
  }

  const ScoreTransform& transform_;
  std::int64_t kv_len_;
  std::int64_t mask_base_;
  std::int64_t padding_base_;
  double alibi_slope_ = 0.0;
  double sink_ = -kInfinity;
};

/// query(row) . key(col), added up in either order.
template <typename T>
T dot(const DenseSlice<T>& query, std::int64_t row, const DenseSlice<T>& key, std::int64_t col,
      std::int64_t size, DotOrder order) {
  T sum = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t d = order == DotOrder::kFirstToLast ? i : size - 1 - i;
    sum += query(row, d) * key(col, d);
  }
  return sum;
}

/// Forward and backward params name these fields alike.
template <typename T, typename Params>
RowWeights<T> row_weights(const Params& params, const DenseSlice<T>& query,
                          const DenseSlice<T>& key, const PairMask& mask, std::int64_t slice,
                          std::int64_t row, DotOrder order) {
  const AttentionShape& shape = params.shape;
  const auto kv_len = static_cast<std::size_t>(shape.kv_len);
  RowWeights<T> result{std::vector<T>(kv_len), std::vector<T>(kv_len, 1), std::vector<bool>(kv_len),
                       std::vector<T>(kv_len, 1)};

  std::vector<T>& score = result.weight;
  const T sink = static_cast<T>(mask.sink());
  T maximum = sink;
  for (std::int64_t j = 0; j < shape.kv_len; ++j) {
    score[j] = -kInfinity;
    if (mask.excludes(row, j)) continue;
    const T bias = static_cast<T>(mask.bias(row, j));
    if (bias == -kInfinity) continue;
    T scaled =
        static_cast<T>(params.transform.scale) * dot(query, row, key, j, shape.head_dim, order);
    if (params.transform.softcap > 0.0) {
      const T cap = static_cast<T>(params.transform.softcap);
      const T t = std::tanh(scaled / cap);
      result.cap_slope[j] = 1 - t * t;
      scaled = cap * t;
    }
    score[j] = scaled + bias + static_cast<T>(mask.alibi(row, j));
    result.attended[j] = score[j] != -kInfinity;
    // Not std::max: a NaN has to stay.
    if (score[j] > maximum || std::isnan(score[j])) maximum = score[j];
    if (std::isnan(maximum)) break;
  }

  if (sink != -kInfinity) result.sink_weight = std::exp(sink - maximum);
  T sum = result.sink_weight;
  for (std::int64_t j = 0; j < shape.kv_len; ++j) {
    if (std::isnan(maximum)) result.attended[j] = !mask.excludes(row, j);
    score[j] = result.attended[j] ? std::exp(score[j] - maximum) : 0;
    sum += score[j];
  }
  if (sum == 0) return result;  // attends to nothing: weights are 0, logsumexp -inf
  result.logsumexp = maximum + std::log(sum);
  for (T& weight : result.weight) weight /= sum;
  result.sink_weight /= sum;

  if (params.dropout.probability > 0.0) {
    const std::uint32_t threshold = dropout_threshold(params.dropout.probability);
    const auto seed = static_cast<std::uint64_t>(*params.dropout.seed);
    for (std::int64_t j = 0; j < shape.kv_len; ++j) {
      result.keep[j] = dropout_keeps(seed, threshold, slice, row, j)
                           ? static_cast<T>(dropout_scale(threshold))
                           : 0;
    }
  }
  return result;
}

/// Sums of the mask's gradient, one for each element of the mask's own shape.
template <typename T>
class MaskGradient {
 public:
  MaskGradient(const StridedView& view, ScalarType dtype, const AttentionShape& shape)
      : view_(view),
        type_(dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32),
        shape_(shape) {
    if (!wanted()) return;
    // A stride of 0 is a dimension of size 1 of the mask.
    std::int64_t count = 1;
    for (int dim = 0; dim < kMaxBatchDims; ++dim) {
      own_.batch_sizes[dim] = view.batch_strides[dim] == 0 ? 1 : shape.batch_sizes[dim];
      count *= own_.batch_sizes[dim];
    }
    own_.query_heads = view.head_stride == 0 ? 1 : shape.query_heads;
    own_.q_len = view.row_stride == 0 ? 1 : shape.q_len;
    own_.kv_len = view.col_stride == 0 ? 1 : shape.kv_len;
    sums_.assign(static_cast<std::size_t>(count * own_.query_heads * own_.q_len * own_.kv_len),
                 T{0});
  }

  bool wanted() const { return view_.data != nullptr; }

  void add(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col, T value) {
    std::int64_t own_batch = 0;
    std::int64_t place = 1;
    for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
      const std::int64_t index = batch % shape_.batch_sizes[dim];
      batch /= shape_.batch_sizes[dim];
      own_batch += (own_.batch_sizes[dim] == 1 ? 0 : index) * place;
      place *= own_.batch_sizes[dim];
    }
    sums_[index(own_batch, own_.query_heads == 1 ? 0 : head, own_.q_len == 1 ? 0 : row,
                own_.kv_len == 1 ? 0 : col)] += value;
  }

  void store() const {
    for (std::int64_t batch = 0; batch < own_.batch(); ++batch) {
      for (std::int64_t head = 0; head < own_.query_heads; ++head) {
        const std::int64_t base = slice_offset(view_, own_.batch_sizes, batch, head);
        for (std::int64_t row = 0; row < own_.q_len; ++row) {
          for (std::int64_t col = 0; col < own_.kv_len; ++col) {
            store_element(view_.data, base + row * view_.row_stride + col * view_.col_stride, type_,
                          sums_[index(batch, head, row, col)]);
          }
        }
      }
    }
  }

 private:
  std::size_t index(std::int64_t batch, std::int64_t head, std::int64_t row,
                    std::int64_t col) const {
    return static_cast<std::size_t>(
        ((batch * own_.query_heads + head) * own_.q_len + row) * own_.kv_len + col);
  }

  const StridedView& view_;
  ScalarType type_;
  const AttentionShape& shape_;
  AttentionShape own_{};  // the mask's sizes; its value_dim and head_dim mean nothing
  std::vector<T> sums_;
};

template <typename T>
void forward(const AttentionForwardParams& params, DotOrder order) {
  const AttentionShape& shape = params.shape;
  for (std::int64_t slice = 0; slice < shape.batch() * shape.query_heads; ++slice) {
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const std::int64_t kv_head = head / shape.group();
    const DenseSlice<T> query(params.query, params.dtype, shape, batch, head, shape.q_len,
                              shape.head_dim);
    const DenseSlice<T> key(params.key, params.dtype, shape, batch, kv_head, shape.kv_len,
                            shape.head_dim);
    const DenseSlice<T> value(params.value, params.dtype, shape, batch, kv_head, shape.kv_len,
                              shape.value_dim);
    const PairMask mask(params.transform, logsumexp_type(params.dtype), shape, batch, head);

    DenseSlice<T> out(shape.q_len, shape.value_dim);
    for (std::int64_t i = 0; i < shape.q_len; ++i) {
      const RowWeights<T> row = row_weights(params, query, key, mask, slice, i, order);
      for (std::int64_t j = 0; j < shape.kv_len; ++j) {
        const T weight = row.weight[j] * row.keep[j];
        if (!row.attended[j] || row.keep[j] == 0) continue;
        for (std::int64_t d = 0; d < shape.value_dim; ++d) out(i, d) += weight * value(j, d);
      }
      if (params.logsumexp != nullptr) {
        store_element(params.logsumexp, slice * shape.q_len + i, logsumexp_type(params.dtype),
                      row.logsumexp);
      }
    }
    out.store(params.out, params.dtype, shape, batch, head);
  }
}

// The exact gradient of the inputs: out and logsumexp are computed again in double, so that their
// rounding in params.out and params.logsumexp is an error of the kernels under test, not of the
// oracle.
/// x as a tensor of this dtype holds it.
template <typename T>
T as_stored(T x, ScalarType dtype) {
  alignas(8) char element[8];
  store_element(element, 0, dtype, x);
  return static_cast<T>(load_element(element, 0, dtype));
}

/// delta_of_out: delta = rowsum(grad_out * out) of the rounded out, as fused attention has it,
/// instead of the sum of the weights' gradients.
template <typename T>
void backward(const AttentionBackwardParams& params, DotOrder order, bool delta_of_out) {
  const AttentionShape& shape = params.shape;
  MaskGradient<T> grad_mask(params.grad_mask, params.dtype, shape);

  for (std::int64_t kv_slice = 0; kv_slice < shape.batch() * shape.kv_heads; ++kv_slice) {
    const std::int64_t batch = kv_slice / shape.kv_heads;
    const std::int64_t kv_head = kv_slice % shape.kv_heads;
    const DenseSlice<T> key(params.key, params.dtype, shape, batch, kv_head, shape.kv_len,
                            shape.head_dim);
    const DenseSlice<T> value(params.value, params.dtype, shape, batch, kv_head, shape.kv_len,
                              shape.value_dim);
    DenseSlice<T> grad_key(shape.kv_len, shape.head_dim);
    DenseSlice<T> grad_value(shape.kv_len, shape.value_dim);

    for (std::int64_t g = 0; g < shape.group(); ++g) {
      const std::int64_t head = kv_head * shape.group() + g;
      const std::int64_t slice = batch * shape.query_heads + head;
      const DenseSlice<T> query(params.query, params.dtype, shape, batch, head, shape.q_len,
                                shape.head_dim);
      const DenseSlice<T> grad_out(params.grad_out, params.dtype, shape, batch, head, shape.q_len,
                                   shape.value_dim);
      const PairMask mask(params.transform, logsumexp_type(params.dtype), shape, batch, head);
      DenseSlice<T> grad_query(shape.q_len, shape.head_dim);
      T grad_sink = 0;

      for (std::int64_t i = 0; i < shape.q_len; ++i) {
        const RowWeights<T> row = row_weights(params, query, key, mask, slice, i, order);
        std::vector<T> grad_weight(static_cast<std::size_t>(shape.kv_len));  // (kv_len) dP
        T delta = 0;
        for (std::int64_t j = 0; j < shape.kv_len; ++j) {
          if (!row.attended[j] || row.keep[j] == 0) continue;
          grad_weight[j] = dot(grad_out, i, value, j, shape.value_dim, order) * row.keep[j];
          delta += row.weight[j] * grad_weight[j];  // summed over j: rowsum(grad_out * out)
          for (std::int64_t d = 0; d < shape.value_dim; ++d) {
            grad_value(j, d) += row.weight[j] * row.keep[j] * grad_out(i, d);
          }
        }
        for (std::int64_t d = 0; delta_of_out && d < shape.value_dim; ++d) {
          if (d == 0) delta = 0;
          T out = 0;
          for (std::int64_t j = 0; j < shape.kv_len; ++j) {
            if (row.attended[j]) out += row.weight[j] * row.keep[j] * value(j, d);
          }
          delta += grad_out(i, d) * as_stored(out, params.dtype);
        }
        if (params.grad_logsumexp != nullptr && row.logsumexp != -kInfinity) {
          delta -= static_cast<T>(load_element(params.grad_logsumexp, slice * shape.q_len + i,
                                               logsumexp_type(params.dtype)));
        }
        grad_sink -= row.sink_weight * delta;
        for (std::int64_t j = 0; j < shape.kv_len; ++j) {
          if (!row.attended[j]) continue;
          const T grad_score = row.weight[j] * (grad_weight[j] - delta);
          const T grad_scaled = grad_score * row.cap_slope[j];
          for (std::int64_t d = 0; d < shape.head_dim; ++d) {
            grad_query(i, d) += static_cast<T>(params.transform.scale) * grad_scaled * key(j, d);
            grad_key(j, d) += static_cast<T>(params.transform.scale) * grad_scaled * query(i, d);
          }
          if (grad_mask.wanted()) grad_mask.add(batch, head, i, j, grad_score);
        }
      }
      grad_query.store(params.grad_query, gradient_type(params), shape, batch, head);
      if (params.grad_sink != nullptr) {
        store_element(params.grad_sink, slice, logsumexp_type(params.dtype), grad_sink);
      }
    }
    grad_key.store(params.grad_key, gradient_type(params), shape, batch, kv_head);
    grad_value.store(params.grad_value, gradient_type(params), shape, batch, kv_head);
  }
  if (grad_mask.wanted()) grad_mask.store();
}

}  // namespace

void attention_forward_reference(const AttentionForwardParams& params) {
  forward<double>(params, DotOrder::kFirstToLast);
}

void attention_backward_reference(const AttentionBackwardParams& params) {
  backward<double>(params, DotOrder::kFirstToLast, false);
}

void attention_forward_written_out(const AttentionForwardParams& params, DotOrder order) {
  params.dtype == ScalarType::kFloat64 ? forward<double>(params, order)
                                       : forward<float>(params, order);
}

void attention_backward_written_out(const AttentionBackwardParams& params, DotOrder order) {
  params.dtype == ScalarType::kFloat64 ? backward<double>(params, order, true)
                                       : backward<float>(params, order, true);
}

}  // namespace torch_ext
