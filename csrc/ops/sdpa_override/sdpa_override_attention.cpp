// aten::scaled_dot_product_attention, overridden.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scaled_dot_product_attention_native.h>
#include <torch/library.h>

#include "sdpa_override_kernels.h"
#include "torch_backend_choice.h"

namespace torch_ext {
namespace {

// batch (at most 4 dimensions), heads, length, head_dim
constexpr std::int64_t kMaxDims = 7;

using AttentionSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      const std::optional<at::Tensor>&, double, bool,
                                      std::optional<double>, bool);

bool takes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const std::optional<at::Tensor>& attn_mask) {
  for (const at::Tensor* tensor : {&query, &key, &value}) {
    if (!is_plain_floating(*tensor) || tensor->device() != query.device() ||
        tensor->dim() > kMaxDims) {
      return false;
    }
  }
  if (!attn_mask.has_value() || !attn_mask->defined()) return true;
  return attn_mask->device() == query.device() && attn_mask->layout() == at::kStrided &&
         !attn_mask->is_nested();
}

at::Tensor fused_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const std::optional<at::Tensor>& attn_mask, double dropout_p,
                           bool is_causal, std::optional<double> scale, bool enable_gqa) {
  if (torch_backend_chosen(query) || !takes(query, key, value, attn_mask)) {
    return at::native::scaled_dot_product_attention(query, key, value, attn_mask, dropout_p,
                                                    is_causal, scale, enable_gqa);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::scaled_dot_product_attention", "")
                             .typed<AttentionSignature>();
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
}

}  // namespace

void override_attention(std::vector<torch::Library>& libraries) {
  // torch's kernel is composite: with ours at the backend key alone, the Autograd keys would no
  // longer fall to it, so both need ours. It decides nothing itself: autograd belongs to the
  // operators that it calls.
  const auto add = [&libraries](c10::DispatchKey key) {
    libraries.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    libraries.back().impl("scaled_dot_product_attention", TORCH_FN(fused_attention));
  };
  add(c10::DispatchKey::CPU);
  add(c10::DispatchKey::AutogradCPU);
  if (has_kernels_for(c10::kCUDA)) {
    add(c10::DispatchKey::CUDA);
    add(c10::DispatchKey::AutogradCUDA);
  }
}

}  // namespace torch_ext
