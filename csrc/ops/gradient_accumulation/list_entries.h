// Tensors as the operands of list entries.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../../kernels/accumulation_params.h"
#include "../tensor_params.h"
#include "list_loops.h"

namespace torch_ext {

inline Operand operand(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), kernel_scalar_type(tensor.scalar_type())};
}

inline Operand operand(const at::Tensor* tensor) {
  return tensor == nullptr ? Operand{} : operand(*tensor);
}

inline ConstOperand const_operand(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), kernel_scalar_type(tensor.scalar_type())};
}

inline ConstOperand const_operand(const at::Tensor* tensor) {
  return tensor == nullptr ? ConstOperand{} : const_operand(*tensor);
}

/// Threads that a list of so many elements is worth: waking one costs as much as some 2^15
/// elements.
inline std::int64_t list_workers(std::int64_t elements) { return 1 + (elements >> 15); }

}  // namespace torch_ext
