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

}  // namespace torch_ext
