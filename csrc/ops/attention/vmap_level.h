// What a batching rule does with its arguments: fold the mapped dimension into the batch, or take
// the samples one by one.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>

namespace torch_ext {

/// The innermost vmap that maps one of an operator's arguments, of which null and undefined ones do
/// not count. While this lives, operators see the tensors below it.
///
/// Read off the tensors: ATen/functorch/DynamicLayer.h, which has the stack of transforms, needs a
/// JSON library that torch does not install.
class VmapLevel {
 public:
  VmapLevel(const char* op, c10::ArrayRef<const at::Tensor*> arguments);

  const c10::SymInt& batch_size() const { return batch_size_; }
  bool is_mapped(const at::Tensor& tensor) const;

  /// (mapped, 1..., sample...) with `dims` dimensions behind the mapped one. A tensor that is not
  /// mapped broadcasts as it is.
  at::Tensor fold(const at::Tensor& tensor, std::int64_t dims) const;

  /// As fold(), but a tensor that is not mapped is expanded to the mapped size.
  at::Tensor fold_expanded(const at::Tensor& tensor, std::int64_t dims) const;

  /// Below this level: sample `index` where the tensor is mapped, else the tensor.
  at::Tensor sample(const at::Tensor& tensor, std::int64_t index) const;

  /// From (mapped, ...) to what the caller of vmap sees: samples shaped `sizes`.
  at::Tensor wrap(const at::Tensor& folded, c10::SymIntArrayRef sizes) const;
  at::Tensor wrap(const at::Tensor& folded) const;

 private:
  at::Tensor unwrap(const at::Tensor& tensor) const;

  c10::impl::ExcludeDispatchKeyGuard guard_;
  std::int64_t level_ = 0;  // functorch counts from 1
  c10::SymInt batch_size_ = 0;
};

}  // namespace torch_ext
