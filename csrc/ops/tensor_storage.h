// Whether the memory that a tensor spans is there. A storage may have been freed or shrunk below it
// (untyped_storage().resize_(0), as sharded training does between uses).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstddef>

namespace torch_ext {

/// Of a tensor with elements: from its storage's beginning to its last element.
inline std::size_t spanned_bytes(const at::Tensor& tensor) {
  std::int64_t last = tensor.storage_offset();
  if (tensor.is_non_overlapping_and_dense()) {
    last += tensor.numel() - 1;
  } else {
    for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.sizes()[dim] - 1) * tensor.strides()[dim];
    }
  }
  return static_cast<std::size_t>(last + 1) * tensor.element_size();
}

/// Whether a kernel may read the tensor. Tensors whose memory is not their own to look at (meta,
/// fake, functional, wrapped by a transform, lazily zero) count as readable: what they stand for is
/// looked at where the kernel runs.
inline bool has_readable_memory(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kElsewhere(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::ZeroTensor,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  if (!tensor.defined() || tensor.is_meta() || tensor.key_set().has_any(kElsewhere) ||
      !tensor.has_storage()) {
    return true;
  }
  return tensor.numel() == 0 || spanned_bytes(tensor) <= tensor.storage().nbytes();
}

/// Refuses a tensor whose storage is too small for it. `place` is the argument's name.
template <typename Place>
void check_readable(const char* op, const Place& place, const at::Tensor& tensor) {
  TORCH_CHECK(has_readable_memory(tensor), "torch_ext::", op, ": ", place,
              " takes a tensor with memory, got one whose storage was freed or shrunk: it has ",
              tensor.storage().nbytes(), " of the ", spanned_bytes(tensor),
              " bytes that sizes and strides span");
}

}  // namespace torch_ext
