#include "plain_dispatch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

namespace torch_ext {

bool needs_gradient(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && tensor->requires_grad()) return true;
  }
  return false;
}

bool is_plain_cpu_inference(std::initializer_list<const at::Tensor*> tensors) {
  constexpr c10::DispatchKeySet kPlain(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
       c10::DispatchKey::AutocastCPU, c10::DispatchKey::BackendSelect});
  c10::DispatchKeySet keys;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined()) keys = keys | tensor->key_set();
  }
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  keys = (keys | local.included_) - local.excluded_;
  // Operator- keeps backend bits, so compare the bits themselves.
  if ((keys.raw_repr() & ~kPlain.raw_repr()) != 0) return false;
  if (needs_gradient(tensors)) return false;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined()) {
      return false;
    }
  }
  return true;
}

at::Tensor draw_dropout_seed(const at::Tensor& like) {
  return at::randint(std::numeric_limits<std::int64_t>::max(), {1},
                     like.options().dtype(at::kLong));
}

}  // namespace torch_ext
