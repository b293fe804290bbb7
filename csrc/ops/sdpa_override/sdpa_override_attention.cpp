// aten::scaled_dot_product_attention, overridden.
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <torch/library.h>

#include "../attention/attention_path.h"
#include "../attention/plain_dispatch.h"
#include "../attention/scaled_dot_product_attention_composite.h"
#include "sdpa_override_kernels.h"
#include "torch_backend_choice.h"

namespace torch_ext {
namespace {

// batch (at most 4 dimensions), heads, length, head_dim
constexpr std::int64_t kMaxDims = 7;

// Null where the call is torch_ext's.
const char* why_torch(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const OptionalTensor& attn_mask) {
  if (const char* reason = why_device_is_torchs(query)) return reason;
  for (const at::Tensor* tensor : {&query, &key, &value}) {
    if (!is_plain_floating(*tensor)) return kUnsupportedTensor;
    if (tensor->device() != query.device()) return kMixedDevices;
    if (tensor->dim() > kMaxDims) return "torch: more than 7 dimensions";
  }
  if (const at::Tensor* mask = given(attn_mask)) {
    if (mask->is_nested() || mask->layout() != at::kStrided) return kUnsupportedTensor;
    if (mask->device() != query.device()) return kMixedDevices;
  }
  if (may_carry_tangents({&query, &key, &value, given(attn_mask)})) {
    return "torch: forward-mode automatic differentiation";
  }
  return nullptr;
}

at::Tensor fused_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                           std::optional<double> scale, bool enable_gqa) {
  if (const char* reason = why_torch(query, key, value, attn_mask)) {
    record_attention_path(reason);
    return at::native::scaled_dot_product_attention(query, key, value, attn_mask, dropout_p,
                                                    is_causal, scale, enable_gqa);
  }
  return composite_scaled_dot_product_attention({.query = &query,
                                                 .key = &key,
                                                 .value = &value,
                                                 .attn_mask = given(attn_mask),
                                                 .dropout_p = dropout_p,
                                                 .is_causal = is_causal,
                                                 .scale = scale,
                                                 .enable_gqa = enable_gqa});
}

}  // namespace

void override_attention(std::vector<torch::Library>& libraries) {
  // torch's kernel is composite: with ours at the backend key alone, the Autograd keys would no
  // longer fall to it, so both need ours. It decides nothing itself: autograd belongs to the
  // operators that it calls.
  // Where a device or a layout is torch's altogether, the override says so and goes on.
  for (const c10::DispatchKey key :
       {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::CUDA,
        c10::DispatchKey::AutogradCUDA, c10::DispatchKey::NestedTensorCPU,
        c10::DispatchKey::NestedTensorCUDA, c10::DispatchKey::AutogradNestedTensor}) {
    libraries.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    libraries.back().impl("scaled_dot_product_attention", TORCH_FN(fused_attention));
  }
}

}  // namespace torch_ext
