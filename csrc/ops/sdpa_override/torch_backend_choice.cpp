#include "torch_backend_choice.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace torch_ext {

bool torch_backend_chosen(const at::Tensor& query) {
  // sdpa_kernel(list) clears every flag that is not in its list, and nothing else touches
  // `overrideable`. The remaining flags are also global switches
  // (torch.backends.cuda.enable_*_sdp), which count where they would change what torch does:
  // memory-efficient exists on CUDA only. cuDNN is left out: it is commonly off for a whole
  // program, which names no other backend.
  const at::Context& context = at::globalContext();
  return !context.userEnabledOverrideableSDP() || !context.userEnabledMathSDP() ||
         !context.userEnabledFlashSDP() ||
         (query.is_cuda() && !context.userEnabledMemEfficientSDP());
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

}  // namespace torch_ext
