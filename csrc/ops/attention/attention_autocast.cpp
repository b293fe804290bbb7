// Autocast: the attention operators run in the lower precision, as aten's do. Doubles stay, masks
// are cast where they are floating, weights are cast once per autocast region.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "attention_operators.h"

namespace torch_ext {
namespace {

/// Casts for one device, and keeps autocast from being asked again below.
template <c10::DeviceType kDevice>
class Casting {
 public:
  Casting()
      : guard_(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)),
        dtype_(at::autocast::get_autocast_dtype(kDevice)) {}

  template <typename Tensor>
  Tensor operator()(const Tensor& tensor) const {
    return at::autocast::cached_cast(dtype_, tensor, kDevice);
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
  at::ScalarType dtype_;
};

template <c10::DeviceType kDevice>
at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const OptionalTensor& attn_mask,
                                        double dropout_p, bool is_causal,
                                        std::optional<double> scale, bool enable_gqa) {
  const Casting<kDevice> cast;
  return call_scaled_dot_product_attention(cast(query), cast(key), cast(value), cast(attn_mask),
                                           dropout_p, is_causal, scale, enable_gqa);
}

template <c10::DeviceType kDevice>
ForwardResult attention_forward(const at::Tensor& query, const at::Tensor& key,
                                const at::Tensor& value, const OptionalTensor& attn_mask,
                                double dropout_p, bool is_causal, std::optional<double> scale,
                                bool enable_gqa, c10::SymInt causal_offset,
                                const OptionalTensor& key_padding_mask,
                                const OptionalTensor& dropout_seed, bool contiguous) {
  const Casting<kDevice> cast;
  return call_attention_forward(cast(query), cast(key), cast(value), cast(attn_mask), dropout_p,
                                is_causal, scale, enable_gqa, causal_offset, key_padding_mask,
                                dropout_seed, contiguous);
}

template <c10::DeviceType kDevice>
at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const OptionalTensor& in_proj_bias, const at::Tensor& out_proj_weight,
                          const OptionalTensor& out_proj_bias, std::int64_t num_heads,
                          const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                          const OptionalTensor& key_padding_mask) {
  const Casting<kDevice> cast;
  return call_self_attention(cast(input), cast(in_proj_weight), cast(in_proj_bias),
                             cast(out_proj_weight), cast(out_proj_bias), num_heads, cast(attn_mask),
                             dropout_p, is_causal, key_padding_mask);
}

template <c10::DeviceType kDevice>
ForwardResult packed_attention_forward(const at::Tensor& qkv, std::int64_t num_heads,
                                       const OptionalTensor& attn_mask, double dropout_p,
                                       bool is_causal, const OptionalTensor& key_padding_mask,
                                       const OptionalTensor& dropout_seed) {
  const Casting<kDevice> cast;
  return call_packed_attention_forward(cast(qkv), num_heads, cast(attn_mask), dropout_p, is_causal,
                                       key_padding_mask, dropout_seed);
}

template <c10::DeviceType kDevice>
void register_kernels(torch::Library& m) {
  m.impl("scaled_dot_product_attention", TORCH_FN(scaled_dot_product_attention<kDevice>));
  m.impl("attention_forward", TORCH_FN(attention_forward<kDevice>));
  m.impl("self_attention", TORCH_FN(self_attention<kDevice>));
  m.impl("packed_attention_forward", TORCH_FN(packed_attention_forward<kDevice>));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) { register_kernels<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) { register_kernels<c10::kCUDA>(m); }

}  // namespace torch_ext
