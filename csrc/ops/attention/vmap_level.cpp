#include "vmap_level.h"

#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/SymbolicShapeMeta.h>

namespace torch_ext {

namespace {

using at::functorch::BatchedTensorImpl;

const BatchedTensorImpl* batched(const at::Tensor& tensor) {
  return tensor.defined() ? at::functorch::maybeGetBatchedImpl(tensor) : nullptr;
}

}  // namespace

VmapLevel::VmapLevel(const char* op, c10::ArrayRef<const at::Tensor*> arguments)
    : guard_(c10::DispatchKey::FuncTorchBatched) {
  for (const at::Tensor* argument : arguments) {
    const BatchedTensorImpl* impl = argument == nullptr ? nullptr : batched(*argument);
    if (impl == nullptr || impl->level() <= level_) continue;
    level_ = impl->level();
    batch_size_ = impl->value().sym_size(impl->bdim());
  }
  TORCH_CHECK(level_ > 0, "torch_ext::", op, ": takes no tensor that has left its torch.vmap");
}

bool VmapLevel::is_mapped(const at::Tensor& tensor) const {
  const BatchedTensorImpl* impl = batched(tensor);
  return impl != nullptr && impl->level() == level_;
}

at::Tensor VmapLevel::unwrap(const at::Tensor& tensor) const {
  if (!is_mapped(tensor)) return tensor;
  const BatchedTensorImpl* impl = batched(tensor);
  return impl->value().movedim(impl->bdim(), 0);
}

at::Tensor VmapLevel::fold(const at::Tensor& tensor, std::int64_t dims) const {
  at::Tensor folded = unwrap(tensor);
  if (!is_mapped(tensor)) return folded;
  while (folded.dim() <= dims) folded = folded.unsqueeze(1);
  // Masks may have dimensions of 1 in front of all others.
  while (folded.dim() > dims + 1) folded = folded.squeeze(1);
  return folded;
}

at::Tensor VmapLevel::fold_expanded(const at::Tensor& tensor, std::int64_t dims) const {
  if (is_mapped(tensor)) return fold(tensor, dims);
  at::Tensor folded = unwrap(tensor);
  while (folded.dim() < dims) folded = folded.unsqueeze(0);
  while (folded.dim() > dims) folded = folded.squeeze(0);
  c10::SymDimVector sizes(folded.sym_sizes().begin(), folded.sym_sizes().end());
  sizes.insert(sizes.begin(), batch_size());
  return folded.expand_symint(sizes);
}

at::Tensor VmapLevel::sample(const at::Tensor& tensor, std::int64_t index) const {
  const at::Tensor unwrapped = unwrap(tensor);
  return is_mapped(tensor) ? unwrapped.select(0, index) : unwrapped;
}

at::Tensor VmapLevel::wrap(const at::Tensor& folded) const {
  return folded.defined() ? at::functorch::makeBatched(folded, 0, level_) : folded;
}

at::Tensor VmapLevel::wrap(const at::Tensor& folded, c10::SymIntArrayRef sizes) const {
  if (!folded.defined()) return folded;
  c10::SymDimVector all(sizes.begin(), sizes.end());
  all.insert(all.begin(), folded.sym_size(0));
  return wrap(folded.reshape_symint(all));
}

}  // namespace torch_ext
