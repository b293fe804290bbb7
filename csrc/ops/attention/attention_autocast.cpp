// Autocast: the attention operators run in the lower precision, as aten's do. Doubles stay, masks
// are cast where they are floating, weights are cast once per autocast region.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "attention_signature.h"

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

  /// Masks are cast where they are floating. Sinks and slopes keep their precision.
  AttentionTensors operator()(const AttentionArguments& arguments) const {
    return arguments.map_tensors([this](AttentionTensor position, const at::Tensor& tensor) {
      return position <= kMask ? (*this)(tensor) : tensor;
    });
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
  at::ScalarType dtype_;
};

template <c10::DeviceType kDevice>
struct AutocastAttention {
  static at::Tensor attention(const AttentionArguments& arguments) {
    const Casting<kDevice> cast;
    const AttentionTensors tensors = cast(arguments);
    return call_scaled_dot_product_attention(arguments.with_tensors(tensors));
  }

  static ForwardResult forward(const AttentionArguments& arguments) {
    const Casting<kDevice> cast;
    const AttentionTensors tensors = cast(arguments);
    return call_attention_forward(arguments.with_tensors(tensors));
  }

  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options) {
    const Casting<kDevice> cast;
    const at::Tensor qkv = cast(*packed.qkv);
    const AttentionTensors tensors = cast(options);
    return call_packed_attention_forward({.qkv = &qkv, .num_heads = packed.num_heads},
                                         options.with_tensors(tensors));
  }

  static at::Tensor self_attention(const SelfAttentionParameters& parameters,
                                   const AttentionArguments& options) {
    const Casting<kDevice> cast;
    const at::Tensor input = cast(*parameters.input);
    const at::Tensor in_proj_weight = cast(*parameters.in_proj_weight);
    const OptionalTensor in_proj_bias = cast(optional(parameters.in_proj_bias));
    const at::Tensor out_proj_weight = cast(*parameters.out_proj_weight);
    const OptionalTensor out_proj_bias = cast(optional(parameters.out_proj_bias));
    const AttentionTensors tensors = cast(options);
    return call_self_attention({.input = &input,
                                .in_proj_weight = &in_proj_weight,
                                .in_proj_bias = given(in_proj_bias),
                                .out_proj_weight = &out_proj_weight,
                                .out_proj_bias = given(out_proj_bias),
                                .num_heads = parameters.num_heads},
                               options.with_tensors(tensors));
  }
};

template <c10::DeviceType kDevice>
void register_kernels(torch::Library& m) {
  m.impl("scaled_dot_product_attention",
         TORCH_FN(scaled_dot_product_attention_kernel<AutocastAttention<kDevice>>));
  m.impl("attention_forward", TORCH_FN(attention_forward_kernel<AutocastAttention<kDevice>>));
  m.impl("self_attention", TORCH_FN(self_attention_kernel<AutocastAttention<kDevice>>));
  m.impl("packed_attention_forward",
         TORCH_FN(packed_attention_forward_kernel<AutocastAttention<kDevice>>));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) { register_kernels<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) { register_kernels<c10::kCUDA>(m); }

}  // namespace torch_ext
