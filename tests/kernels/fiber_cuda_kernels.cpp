#include "cuda_attention_kernels.h"
#include "device_mirror.h"
#include "fiber_block.h"
#include "kernels/cuda/attention_backward_launches.h"
#include "kernels/cuda/attention_forward_launches.h"
#include "kernels/reference/attention_reference.h"

namespace torch_ext::testing {
namespace {

template <bool kAllowTf32>
std::size_t forward_workspace(const AttentionForwardParams& params, int /*num_workers*/) {
  return cuda::schedule_forward(params, kAllowTf32).total_bytes;
}

template <bool kAllowTf32>
KernelPath forward(const AttentionForwardParams& params, const TaskRunner& /*runner*/,
                   void* workspace) {
  const cuda::CudaForwardSchedule schedule = cuda::schedule_forward(params, kAllowTf32);
  if (schedule.path == cuda::CudaPath::kEmpty) {  // the operators' part
    attention_forward_reference(params);
    return "cuda.empty";
  }
  return cuda::launch_forward(schedule, workspace, FiberLauncher());
}

/// Of an H100.
constexpr std::size_t kSharedLimit = 227 * 1024;

template <bool kDeterministic, bool kAllowTf32>
std::size_t backward_workspace(const AttentionBackwardParams& params, int /*num_workers*/) {
  return cuda::schedule_backward(params, {kDeterministic, kSharedLimit, kAllowTf32}).total_bytes;
}

template <bool kDeterministic, bool kAllowTf32>
KernelPath backward(const AttentionBackwardParams& params, const TaskRunner& /*runner*/,
                    void* workspace) {
  const cuda::CudaBackwardSchedule schedule =
      cuda::schedule_backward(params, {kDeterministic, kSharedLimit, kAllowTf32});
  if (schedule.path == cuda::CudaPath::kEmpty) {
    attention_backward_reference(params);
    return "cuda.empty";
  }
  return cuda::launch_backward(schedule, workspace, FiberLauncher());
}

template <bool kDeterministic, bool kAllowTf32>
KernelTable fiber_table() {
  KernelTable table{};
  table.capability = CpuCapability::kDefault;
  table.attention_forward_workspace = forward_workspace<kAllowTf32>;
  table.attention_forward = forward<kAllowTf32>;
  table.attention_backward_workspace = backward_workspace<kDeterministic, kAllowTf32>;
  table.attention_backward = backward<kDeterministic, kAllowTf32>;
  return table;
}

}  // namespace

#if defined(TORCH_EXT_CUDA_TESTS)
CudaAttentionKernels device_attention_kernels();
#endif

std::vector<CudaAttentionKernels> cuda_attention_kernels() {
  static const KernelTable standard = fiber_table<false, false>();
  static const KernelTable deterministic = fiber_table<true, false>();
  static const KernelTable tf32 = fiber_table<false, true>();
  static const KernelTable deterministic_tf32 = fiber_table<true, true>();
  std::vector<CudaAttentionKernels> kernels{
      {"emulated_cuda", &standard, &deterministic, &tf32, &deterministic_tf32}};
#if defined(TORCH_EXT_CUDA_TESTS)
  if (has_cuda_device()) kernels.push_back(device_attention_kernels());
#endif
  return kernels;
}

}  // namespace torch_ext::testing
