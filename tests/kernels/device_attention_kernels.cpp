// The attention kernels on a GPU: a call's tensors are mirrored there, and back.
#if defined(TORCH_EXT_CUDA_TESTS)
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda_attention_kernels.h"
#include "device_mirror.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/reference/attention_reference.h"

namespace torch_ext::testing {
namespace {

constexpr std::size_t kWorkspaceAlignment = 256;

/// Bytes from a view's first element to behind its last one.
template <typename View>
std::size_t view_bytes(const View& view, const AttentionShape& shape, std::int64_t heads,
                       std::int64_t rows, std::int64_t cols, std::size_t width) {
  if (view.data == nullptr || shape.batch() * heads * rows * cols == 0) return 0;
  std::int64_t last =
      (heads - 1) * view.head_stride + (rows - 1) * view.row_stride + (cols - 1) * view.col_stride;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    last += (shape.batch_sizes[dim] - 1) * view.batch_strides[dim];
  }
  return static_cast<std::size_t>(last + 1) * width;
}

/// What forward and backward params share.
template <typename Params>
class DeviceAttentionCall {
 public:
  DeviceAttentionCall(const Params& host, void* workspace, std::size_t workspace_bytes)
      : params(host), workspace_(workspace) {
    const AttentionShape& shape = host.shape;
    add(host.query, shape.query_heads, shape.q_len, shape.head_dim, host.dtype);
    add(host.key, shape.kv_heads, shape.kv_len, shape.head_dim, host.dtype);
    add(host.value, shape.kv_heads, shape.kv_len, shape.value_dim, host.dtype);
    add(host.out, shape.query_heads, shape.q_len, shape.value_dim, host.dtype);
    add_stats(host.logsumexp);
    const AttentionMask& mask = host.transform.mask;
    add(mask.view, shape.query_heads, shape.q_len, shape.kv_len,
        mask.kind == AttentionMaskKind::kBoolean ? ScalarType::kBool : mask.dtype);
    ConstStridedView padding = host.transform.key_padding;  // the other strides are not to be used
    padding.head_stride = padding.row_stride = 0;
    add(padding, 1, 1, shape.kv_len, ScalarType::kBool);
    mirror.add(host.dropout.seed, sizeof(std::int64_t), sizeof(std::int64_t));
    mirror.add(workspace, workspace_bytes, kWorkspaceAlignment);
  }

  template <typename View>
  void add(const View& view, std::int64_t heads, std::int64_t rows, std::int64_t cols,
           ScalarType type) {
    const std::size_t width = element_size(type);
    mirror.add(view.data, view_bytes(view, params.shape, heads, rows, cols, width), width);
  }

  /// (batch, query_heads, q_len) of the accumulating type.
  void add_stats(const void* data) {
    const AttentionShape& shape = params.shape;
    const std::size_t width = params.dtype == ScalarType::kFloat64 ? 8 : 4;
    mirror.add(data,
               static_cast<std::size_t>(shape.batch() * shape.query_heads * shape.q_len) * width,
               width);
  }

  template <typename View>
  void move(View& view) const {
    view.data = mirror.at(view.data);
  }

  void upload() {
    mirror.upload();
    move(params.query);
    move(params.key);
    move(params.value);
    move(params.out);
    params.logsumexp = mirror.at(params.logsumexp);
    move(params.transform.mask.view);
    move(params.transform.key_padding);
    params.dropout.seed = mirror.at(params.dropout.seed);
  }

  KernelPath finish(const cuda::AttentionLaunch& launch) {
    check_cuda(launch.status, "attention");
    mirror.download();
    return launch.path;
  }

  void* workspace() const { return mirror.at(workspace_); }

  Params params;
  DeviceMirror mirror;

 private:
  void* workspace_;
};

template <bool kAllowTf32>
std::size_t forward_workspace(const AttentionForwardParams& params, int /*num_workers*/) {
  return cuda::schedule_forward(params, kAllowTf32).total_bytes;
}

template <bool kAllowTf32>
KernelPath forward(const AttentionForwardParams& params, const TaskRunner& /*runner*/,
                   void* workspace) {
  const cuda::CudaForwardSchedule host = cuda::schedule_forward(params, kAllowTf32);
  if (host.path == cuda::CudaPath::kEmpty) {  // the operators' part
    attention_forward_reference(params);
    return "cuda.empty";
  }
  DeviceAttentionCall<AttentionForwardParams> call(params, workspace, host.total_bytes);
  call.upload();
  return call.finish(cuda::attention_forward(cuda::schedule_forward(call.params, kAllowTf32),
                                             call.workspace(), nullptr));
}

template <bool kDeterministic, bool kAllowTf32>
cuda::CudaBackwardSchedule backward_schedule(const AttentionBackwardParams& params) {
  int limit = 0;
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
             "cudaDeviceGetAttribute");
  return cuda::schedule_backward(params, {.deterministic = kDeterministic,
                                          .shared_limit = static_cast<std::size_t>(limit),
                                          .allow_tf32 = kAllowTf32});
}

template <bool kDeterministic, bool kAllowTf32>
std::size_t backward_workspace(const AttentionBackwardParams& params, int /*num_workers*/) {
  return backward_schedule<kDeterministic, kAllowTf32>(params).total_bytes;
}

template <bool kDeterministic, bool kAllowTf32>
KernelPath backward(const AttentionBackwardParams& params, const TaskRunner& /*runner*/,
                    void* workspace) {
  const cuda::CudaBackwardSchedule host = backward_schedule<kDeterministic, kAllowTf32>(params);
  if (host.path == cuda::CudaPath::kEmpty) {
    attention_backward_reference(params);
    return "cuda.empty";
  }
  DeviceAttentionCall<AttentionBackwardParams> call(params, workspace, host.total_bytes);
  const AttentionShape& shape = params.shape;
  const ScalarType gradient = gradient_type(params);
  call.add(params.grad_out, shape.query_heads, shape.q_len, shape.value_dim, params.dtype);
  call.add_stats(params.grad_logsumexp);
  call.add(params.grad_query, shape.query_heads, shape.q_len, shape.head_dim, gradient);
  call.add(params.grad_key, shape.kv_heads, shape.kv_len, shape.head_dim, gradient);
  call.add(params.grad_value, shape.kv_heads, shape.kv_len, shape.value_dim, gradient);
  call.add(params.grad_mask, shape.query_heads, shape.q_len, shape.kv_len,
           params.dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32);
  call.upload();
  AttentionBackwardParams& device = call.params;
  call.move(device.grad_out);
  device.grad_logsumexp = call.mirror.at(params.grad_logsumexp);
  call.move(device.grad_query);
  call.move(device.grad_key);
  call.move(device.grad_value);
  call.move(device.grad_mask);
  return call.finish(cuda::attention_backward(backward_schedule<kDeterministic, kAllowTf32>(device),
                                              call.workspace(), nullptr));
}

template <bool kDeterministic, bool kAllowTf32>
KernelTable device_table() {
  KernelTable table{};
  table.capability = CpuCapability::kDefault;
  table.attention_forward_workspace = forward_workspace<kAllowTf32>;
  table.attention_forward = forward<kAllowTf32>;
  table.attention_backward_workspace = backward_workspace<kDeterministic, kAllowTf32>;
  table.attention_backward = backward<kDeterministic, kAllowTf32>;
  return table;
}

}  // namespace

CudaAttentionKernels device_attention_kernels() {
  static const KernelTable standard = device_table<false, false>();
  static const KernelTable deterministic = device_table<true, false>();
  static const KernelTable tf32 = device_table<false, true>();
  static const KernelTable deterministic_tf32 = device_table<true, true>();
  return {"cuda", &standard, &deterministic, &tf32, &deterministic_tf32};
}

}  // namespace torch_ext::testing
#endif
