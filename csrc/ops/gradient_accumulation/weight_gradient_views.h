// The operands of the weight gradients as matrices.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/reshape.h>

#include <cstdint>

#include "../../kernels/accumulation_params.h"
#include "../tensor_params.h"

namespace torch_ext {

inline Matrix matrix(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), kernel_scalar_type(tensor.scalar_type()), tensor.strides()[0],
          tensor.strides()[1]};
}

inline ConstMatrix const_matrix(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), kernel_scalar_type(tensor.scalar_type()), tensor.strides()[0],
          tensor.strides()[1]};
}

/// (tokens..., features) as (tokens, features): a view, unless no strides can say it.
inline at::Tensor flatten_tokens(const at::Tensor& tensor) {
  std::int64_t tokens = 1;
  for (const std::int64_t size : tensor.sizes().slice(0, tensor.dim() - 1)) tokens *= size;
  return tensor.reshape({tokens, tensor.size(-1)});
}

}  // namespace torch_ext
