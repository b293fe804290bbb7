// Whether a tensor still has the memory that its sizes ask for: storages are freed under tensors
// (untyped_storage().resize_(0)), and a plain read of one would end the process.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

namespace torch_ext {

inline bool has_its_memory(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.is_meta() || tensor.numel() == 0) return true;
  // Zeros that are not written out, and tensors of Python's.
  if (tensor._is_zerotensor() || tensor.key_set().has(c10::DispatchKey::Python)) return true;
  const std::size_t needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                       static_cast<std::size_t>(tensor.storage_offset()));
  return tensor.storage().nbytes() >= needed;
}

}  // namespace torch_ext
