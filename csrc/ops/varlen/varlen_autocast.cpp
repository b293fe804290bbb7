// Autocast for the varlen operators: as for dense attention, query, key and value run in the lower
// precision; a sink is added in float and stays as it is.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "varlen_operators.h"
#include "varlen_signature.h"

namespace torch_ext {
namespace {

template <c10::DeviceType kDevice, bool kSeeded>
struct Autocast {
  static VarlenForwardResult forward(VarlenArguments arguments) {
    const c10::impl::ExcludeDispatchKeyGuard guard(
        at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
    for (at::Tensor* tensor : {&arguments.query, &arguments.key, &arguments.value}) {
      *tensor = at::autocast::cached_cast(dtype, *tensor, kDevice);
    }
    return kSeeded ? seeded_varlen_attention(std::move(arguments))
                   : call_varlen_attention_forward(arguments);
  }
};

template <c10::DeviceType kDevice>
void register_kernels(torch::Library& m) {
  m.impl("varlen_attention", TORCH_FN((VarlenEntries<Autocast<kDevice, true>>::forward)));
  m.impl("varlen_attention_forward", TORCH_FN((VarlenEntries<Autocast<kDevice, false>>::forward)));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, AutocastCPU, m) { register_kernels<c10::kCPU>(m); }
TORCH_LIBRARY_IMPL(torch_ext, AutocastCUDA, m) { register_kernels<c10::kCUDA>(m); }

}  // namespace torch_ext
