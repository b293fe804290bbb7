// An argument that may be None.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_ext {

using OptionalTensor = std::optional<at::Tensor>;

/// Null where the argument is None.
inline const at::Tensor* given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

/// Null where the tensor is undefined.
inline const at::Tensor* given(const at::Tensor& tensor) {
  return tensor.defined() ? &tensor : nullptr;
}

/// And back: None where the pointer is null.
inline OptionalTensor optional(const at::Tensor* tensor) {
  return tensor == nullptr ? std::nullopt : OptionalTensor(*tensor);
}

}  // namespace torch_ext
