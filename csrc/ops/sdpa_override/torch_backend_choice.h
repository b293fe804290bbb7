// When a call stays torch's own.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext {

// What last_attention_path() says then.
inline constexpr const char* kBackendChosen =
    "torch: sdpa_kernel(...) leaves out a backend of this device";
inline constexpr const char* kUnsupportedTensor =
    "torch: a tensor is nested, sparse, quantized or of a dtype without kernels";
inline constexpr const char* kWeightsAskedFor = "torch: weights asked for (need_weights=True)";
inline constexpr const char* kMixedDevices = "torch: tensors on different devices";
inline constexpr const char* kNoKernels = "torch: no kernels for this device";
inline constexpr const char* kCudaNotEnabled = "torch: CUDA tensors need enable(cuda=True)";
inline constexpr const char* kForOnnx = "torch: the graph is exported to ONNX";

/// Why a call on tensors like `query` is torch's whatever its arguments are: its device, the
/// backends that the program asks for, an export. Null where it may be torch_ext's.
const char* why_device_is_torchs(const at::Tensor& query);

/// Whether torch_ext's operators take this tensor's layout, device and dtype.
bool is_plain_floating(const at::Tensor& tensor);

/// Whether torch_ext has kernels for this device.
bool has_kernels_for(c10::DeviceType device);

/// `check` says whether a graph is being made for ONNX, which knows no operators of torch_ext. It
/// is asked for calls that are traced, and for no others. Null: never.
void set_onnx_check(bool (*check)());

}  // namespace torch_ext
