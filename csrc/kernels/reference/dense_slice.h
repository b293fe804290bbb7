// A matrix of an attention tensor as the references compute with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../attention_params.h"
#include "element_access.h"

namespace torch_ext::reference {

/// One (batch, head) slice of a tensor, in the type of the arithmetic.
template <typename T>
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
        (*this)(row, col) = static_cast<T>(
            load_element(view.data, base + row * view.row_stride + col * view.col_stride, type));
      }
    }
  }

  T& operator()(std::int64_t row, std::int64_t col) {
    return values_[static_cast<std::size_t>(row * cols_ + col)];
  }
  T operator()(std::int64_t row, std::int64_t col) const {
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
  std::vector<T> values_;
};

}  // namespace torch_ext::reference
