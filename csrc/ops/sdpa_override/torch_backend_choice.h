// When a call stays torch's own.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext {

// What last_attention_path() says then.
inline constexpr const char* kBackendChosen =
    "torch: a backend is chosen (sdpa_kernel(...), torch.backends.cuda.enable_*_sdp)";
inline constexpr const char* kUnsupportedTensor =
    "torch: a tensor is nested, sparse, quantized or of a dtype without kernels";
inline constexpr const char* kMixedDevices = "torch: tensors on different devices";

/// Whether the program has asked for certain of torch's attention backends, for example inside
/// torch.nn.attention.sdpa_kernel(...).
bool torch_backend_chosen(const at::Tensor& query);

/// Whether torch_ext's operators take this tensor's layout, device and dtype.
bool is_plain_floating(const at::Tensor& tensor);

/// Whether torch_ext has kernels for this device.
bool has_kernels_for(c10::DeviceType device);

}  // namespace torch_ext
