#include "plain_dispatch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <limits>

#include "functorch_node.h"

namespace torch_ext {

bool needs_gradient(c10::ArrayRef<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

bool is_variable(const at::Tensor* mask) {
  return mask != nullptr && mask->defined() && mask->requires_grad();
}

namespace {

/// Whether these keys, with those of modes on this thread, are of dense CPU tensors and autograd.
bool are_plain(c10::DispatchKeySet keys) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::BackendSelect});
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  keys = (keys | local.included_) - local.excluded_;
  // Operator- keeps backend bits, so compare the bits themselves.
  return (keys.raw_repr() & ~kPlain.raw_repr()) == 0;
}

bool any_tangent(c10::ArrayRef<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined()) {
      return true;
    }
  }
  return false;
}

}  // namespace

bool is_plain_cpu(const at::Tensor& tensor) { return are_plain(tensor.key_set()); }

bool is_plain_cpu_call(c10::ArrayRef<const at::Tensor*> tensors) {
  c10::DispatchKeySet keys;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined()) keys = keys | tensor->key_set();
  }
  return are_plain(keys) && !any_tangent(tensors);
}

bool may_carry_tangents(c10::ArrayRef<const at::Tensor*> tensors) {
  if (any_tangent(tensors)) return true;
  return in_functorch_transform() && torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

at::Tensor draw_dropout_seed(const at::Tensor& like) {
  return at::randint(std::numeric_limits<std::int64_t>::max(), {1},
                     like.options().dtype(at::kLong));
}

}  // namespace torch_ext
