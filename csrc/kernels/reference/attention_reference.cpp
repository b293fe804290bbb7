#include "attention_reference.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../counter_rng.h"
#include "element_access.h"

namespace torch_ext {
namespace {

using reference::load_element;
using reference::store_element;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One (batch, head) slice of a tensor, as doubles.
class DenseSlice {
 public:
  DenseSlice(std::int64_t rows, std::int64_t cols)
      : cols_(cols), values_(static_cast<std::size_t>(rows * cols)) {}

  DenseSlice(const ConstStridedView& view, ScalarType type, const AttentionShape& shape,
             std::int64_t batch, std::int64_t head, std::int64_t rows, std::int64_t cols)
      : DenseSlice(rows, cols) {
    const std::int64_t base = slice_offset(view, shape.batch_sizes, batch, head);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        (*this)(row, col) =
            load_element(view.data, base + row * view.row_stride + col * view.col_stride, type);
      }
    }
  }

  double& operator()(std::int64_t row, std::int64_t col) {
    return values_[static_cast<std::size_t>(row * cols_ + col)];
  }
  double operator()(std::int64_t row, std::int64_t col) const {
    return values_[static_cast<std::size_t>(row * cols_ + col)];
  }

  void store(const StridedView& view, ScalarType type, const AttentionShape& shape,
             std::int64_t batch, std::int64_t head) const {
    const std::int64_t base = slice_offset(view, shape.batch_sizes, batch, head);
    const std::int64_t rows = cols_ == 0 ? 0 : static_cast<std::int64_t>(values_.size()) / cols_;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols_; ++col) {
        store_element(view.data, base + row * view.row_stride + col * view.col_stride, type,
                      (*this)(row, col));
      }
    }
  }

 private:
  std::int64_t cols_;
  std::vector<double> values_;
};

/// What one query row does with each key: the normalised weight before dropout, and the factor that
/// dropout multiplies it by.
struct RowWeights {
  std::vector<double> weight;  // (kv_len)
  std::vector<double> keep;    // (kv_len)
  std::vector<bool> attended;  // (kv_len): false = the pair takes no part, whatever its values
  double logsumexp = -kInfinity;
};

/// The score that masks add to, or -inf where they exclude the pair.
class PairMask {
 public:
  PairMask(const AttentionMasking& masking, const AttentionShape& shape, std::int64_t batch,
           std::int64_t head)
      : masking_(masking),
        mask_base_(slice_offset(masking.mask, shape.batch_sizes, batch, head)),
        padding_base_(slice_offset(masking.key_padding, shape.batch_sizes, batch, 0)) {}

  bool excludes(std::int64_t query, std::int64_t key) const {
    if (masking_.is_causal && key > query + masking_.causal_offset) return true;
    if (masking_.key_padding.data != nullptr &&
        load_element(masking_.key_padding.data,
                     padding_base_ + key * masking_.key_padding.col_stride,
                     ScalarType::kBool) != 0.0) {
      return true;
    }
    return masking_.kind == AttentionMaskKind::kBoolean &&
           load_element(masking_.mask.data, mask_offset(query, key), ScalarType::kBool) == 0.0;
  }

  double bias(std::int64_t query, std::int64_t key) const {
    if (masking_.kind != AttentionMaskKind::kAdditive) return 0.0;
    return load_element(masking_.mask.data, mask_offset(query, key), masking_.mask_dtype);
  }

 private:
  std::int64_t mask_offset(std::int64_t query, std::int64_t key) const {
    return mask_base_ + query * masking_.mask.row_stride + key * masking_.mask.col_stride;
  }

  const AttentionMasking& masking_;
  std::int64_t mask_base_;
  std::int64_t padding_base_;
};

/// Forward and backward params name these fields alike.
template <typename Params>
RowWeights row_weights(const Params& params, const DenseSlice& query, const DenseSlice& key,
                       const PairMask& mask, std::int64_t slice, std::int64_t row) {
  const AttentionShape& shape = params.shape;
  const auto kv_len = static_cast<std::size_t>(shape.kv_len);
  RowWeights result{std::vector<double>(kv_len), std::vector<double>(kv_len, 1.0),
                    std::vector<bool>(kv_len), -kInfinity};

  std::vector<double>& score = result.weight;
  double maximum = -kInfinity;
  for (std::int64_t j = 0; j < shape.kv_len; ++j) {
    score[j] = -kInfinity;
    if (mask.excludes(row, j)) continue;
    const double bias = mask.bias(row, j);
    if (bias == -kInfinity) continue;
    double dot = 0.0;
    for (std::int64_t d = 0; d < shape.head_dim; ++d) dot += query(row, d) * key(j, d);
    score[j] = params.scale * dot + bias;
    result.attended[j] = score[j] != -kInfinity;
    // Not std::max: a NaN has to stay.
    if (score[j] > maximum || std::isnan(score[j])) maximum = score[j];
    if (std::isnan(maximum)) break;
  }

  double sum = 0.0;
  for (std::int64_t j = 0; j < shape.kv_len; ++j) {
    if (std::isnan(maximum)) result.attended[j] = !mask.excludes(row, j);
    score[j] = result.attended[j] ? std::exp(score[j] - maximum) : 0.0;
    sum += score[j];
  }
  if (sum == 0.0) return result;  // attends to nothing: weights are 0, logsumexp -inf
  result.logsumexp = maximum + std::log(sum);
  for (double& weight : result.weight) weight /= sum;

  if (params.dropout.probability > 0.0) {
    const std::uint32_t threshold = dropout_threshold(params.dropout.probability);
    const auto seed = static_cast<std::uint64_t>(*params.dropout.seed);
    for (std::int64_t j = 0; j < shape.kv_len; ++j) {
      result.keep[j] =
          dropout_keeps(seed, threshold, slice, row, j) ? dropout_scale(threshold) : 0.0;
    }
  }
  return result;
}

/// Sums of the mask's gradient in double, one for each element of the mask's own shape.
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
                 0.0);
  }

  bool wanted() const { return view_.data != nullptr; }

  void add(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col,
           double value) {
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
  std::vector<double> sums_;
};

ScalarType logsumexp_type(ScalarType dtype) {
  return dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
}

}  // namespace

void attention_forward_reference(const AttentionForwardParams& params) {
  const AttentionShape& shape = params.shape;
  for (std::int64_t slice = 0; slice < shape.batch() * shape.query_heads; ++slice) {
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const std::int64_t kv_head = head / shape.group();
    const DenseSlice query(params.query, params.dtype, shape, batch, head, shape.q_len,
                           shape.head_dim);
    const DenseSlice key(params.key, params.dtype, shape, batch, kv_head, shape.kv_len,
                         shape.head_dim);
    const DenseSlice value(params.value, params.dtype, shape, batch, kv_head, shape.kv_len,
                           shape.value_dim);
    const PairMask mask(params.masking, shape, batch, head);

    DenseSlice out(shape.q_len, shape.value_dim);
    for (std::int64_t i = 0; i < shape.q_len; ++i) {
      const RowWeights row = row_weights(params, query, key, mask, slice, i);
      for (std::int64_t j = 0; j < shape.kv_len; ++j) {
        const double weight = row.weight[j] * row.keep[j];
        if (!row.attended[j] || row.keep[j] == 0.0) continue;
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
void attention_backward_reference(const AttentionBackwardParams& params) {
  const AttentionShape& shape = params.shape;
  MaskGradient grad_mask(params.grad_mask, params.dtype, shape);

  for (std::int64_t kv_slice = 0; kv_slice < shape.batch() * shape.kv_heads; ++kv_slice) {
    const std::int64_t batch = kv_slice / shape.kv_heads;
    const std::int64_t kv_head = kv_slice % shape.kv_heads;
    const DenseSlice key(params.key, params.dtype, shape, batch, kv_head, shape.kv_len,
                         shape.head_dim);
    const DenseSlice value(params.value, params.dtype, shape, batch, kv_head, shape.kv_len,
                           shape.value_dim);
    DenseSlice grad_key(shape.kv_len, shape.head_dim);
    DenseSlice grad_value(shape.kv_len, shape.value_dim);

    for (std::int64_t g = 0; g < shape.group(); ++g) {
      const std::int64_t head = kv_head * shape.group() + g;
      const std::int64_t slice = batch * shape.query_heads + head;
      const DenseSlice query(params.query, params.dtype, shape, batch, head, shape.q_len,
                             shape.head_dim);
      const DenseSlice grad_out(params.grad_out, params.dtype, shape, batch, head, shape.q_len,
                                shape.value_dim);
      const PairMask mask(params.masking, shape, batch, head);
      DenseSlice grad_query(shape.q_len, shape.head_dim);

      for (std::int64_t i = 0; i < shape.q_len; ++i) {
        const RowWeights row = row_weights(params, query, key, mask, slice, i);
        std::vector<double> grad_weight(static_cast<std::size_t>(shape.kv_len));  // (kv_len) dP
        double delta = 0.0;
        for (std::int64_t j = 0; j < shape.kv_len; ++j) {
          if (!row.attended[j] || row.keep[j] == 0.0) continue;
          double dot = 0.0;
          for (std::int64_t d = 0; d < shape.value_dim; ++d) dot += grad_out(i, d) * value(j, d);
          grad_weight[j] = dot * row.keep[j];
          delta += row.weight[j] * grad_weight[j];  // summed over j: rowsum(grad_out * out)
          for (std::int64_t d = 0; d < shape.value_dim; ++d) {
            grad_value(j, d) += row.weight[j] * row.keep[j] * grad_out(i, d);
          }
        }
        if (params.grad_logsumexp != nullptr && row.logsumexp != -kInfinity) {
          delta -= load_element(params.grad_logsumexp, slice * shape.q_len + i,
                                logsumexp_type(params.dtype));
        }
        for (std::int64_t j = 0; j < shape.kv_len; ++j) {
          if (!row.attended[j]) continue;
          const double grad_score = row.weight[j] * (grad_weight[j] - delta);
          for (std::int64_t d = 0; d < shape.head_dim; ++d) {
            grad_query(i, d) += params.scale * grad_score * key(j, d);
            grad_key(j, d) += params.scale * grad_score * query(i, d);
          }
          if (grad_mask.wanted()) grad_mask.add(batch, head, i, j, grad_score);
        }
      }
      grad_query.store(params.grad_query, gradient_type(params), shape, batch, head);
    }
    grad_key.store(params.grad_key, gradient_type(params), shape, batch, kv_head);
    grad_value.store(params.grad_value, gradient_type(params), shape, batch, kv_head);
  }
  if (grad_mask.wanted()) grad_mask.store();
}

}  // namespace torch_ext
