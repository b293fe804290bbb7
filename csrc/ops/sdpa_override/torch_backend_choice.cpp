#include "torch_backend_choice.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch_ext/sdpa_override.h>

#include <atomic>

namespace torch_ext {
namespace {

std::atomic<bool (*)()> onnx_check{nullptr};

// sdpa_kernel(list) clears every flag that is not in its list, and `overrideable` is cleared by
// nothing else. The other flags are also global switches (torch.backends.cuda.enable_*_sdp), which
// programs set for their GPU. cuDNN is not looked at: it is commonly off for a whole program.
bool backend_is_left_out(const at::Tensor& query) {
  const at::Context& context = at::globalContext();
  // The CPU has these two.
  const bool cpu_has = context.userEnabledFlashSDP() && context.userEnabledMathSDP();
  if (query.is_cuda()) return !cpu_has || !context.userEnabledMemEfficientSDP();
  return !cpu_has && !context.userEnabledOverrideableSDP();
}

bool is_traced(const at::Tensor& query) {
  constexpr c10::DispatchKeySet kPython(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonDispatcher});
  return (query.key_set() | c10::impl::tls_local_dispatch_key_set().included_).has_any(kPython);
}

}  // namespace

const char* why_device_is_torchs(const at::Tensor& query) {
  if (!query.is_cpu()) {
    if (query.is_cuda() && !is_cuda_enabled()) return kCudaNotEnabled;
    if (!has_kernels_for(query.device().type())) return kNoKernels;
  }
  if (backend_is_left_out(query)) return kBackendChosen;
  if (is_traced(query)) {
    bool (*const check)() = onnx_check.load(std::memory_order_acquire);
    if (check != nullptr && check()) return kForOnnx;
  }
  return nullptr;
}

bool is_plain_floating(const at::Tensor& tensor) {
  if (tensor.is_nested() || tensor.layout() != at::kStrided) return false;
  const at::ScalarType dtype = tensor.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

bool has_kernels_for(c10::DeviceType device) {
  static const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_ext::attention_forward", "");
  return op.hasKernelForDispatchKey(
      c10::computeDispatchKey(std::nullopt, at::kStrided, c10::Device(device)));
}

void set_onnx_check(bool (*check)()) { onnx_check.store(check, std::memory_order_release); }

}  // namespace torch_ext
