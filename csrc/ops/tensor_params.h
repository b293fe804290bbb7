// at::Tensor -> kernel params: the only conversion. Any strides pass through, so that transposed
// heads, slices of packed projections and expanded batches are read where they lie.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "../kernels/strided_view.h"

namespace torch_ext {

inline ScalarType kernel_scalar_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ScalarType::kFloat32;
    case at::kDouble:
      return ScalarType::kFloat64;
    case at::kBFloat16:
      return ScalarType::kBFloat16;
    case at::kHalf:
      return ScalarType::kFloat16;
    case at::kBool:
      return ScalarType::kBool;
    default:
      TORCH_CHECK(false, "torch_ext: no kernel reads ", type);
  }
}

/// Stride of the dimension that is `from_right` places from the last; 0 where the tensor broadcasts
/// it: it has no such dimension, or a single element there.
inline std::int64_t broadcast_stride(const at::Tensor& tensor, std::int64_t from_right) {
  const std::int64_t dim = tensor.dim() - 1 - from_right;
  return dim < 0 || tensor.sizes()[dim] == 1 ? 0 : tensor.strides()[dim];
}

namespace detail {

// Batch dimensions are aligned at the right: the last of kMaxBatchDims lies in front of the heads.
template <typename View>
void set_batch_strides(View& view, const at::Tensor& tensor, std::int64_t first_from_right) {
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    view.batch_strides[kMaxBatchDims - 1 - dim] = broadcast_stride(tensor, first_from_right + dim);
  }
}

template <typename View>
View view_of(const at::Tensor& tensor, decltype(View::data) data) {
  View view;
  view.data = data;
  set_batch_strides(view, tensor, 3);
  view.head_stride = broadcast_stride(tensor, 2);
  view.row_stride = broadcast_stride(tensor, 1);
  view.col_stride = broadcast_stride(tensor, 0);
  return view;
}

}  // namespace detail

/// A tensor of shape ([batch...,] [head,] row, col), or broadcastable to one.
inline ConstStridedView strided_view(const at::Tensor& tensor) {
  return detail::view_of<ConstStridedView>(tensor, tensor.const_data_ptr());
}

inline StridedView mutable_strided_view(const at::Tensor& tensor) {
  return detail::view_of<StridedView>(tensor, tensor.mutable_data_ptr());
}

/// A tensor of shape ([batch...,] col), the same for all heads and rows.
inline ConstStridedView padding_view(const at::Tensor& tensor) {
  ConstStridedView view;
  view.data = tensor.const_data_ptr();
  detail::set_batch_strides(view, tensor, 1);
  view.col_stride = broadcast_stride(tensor, 0);
  return view;
}

}  // namespace torch_ext
