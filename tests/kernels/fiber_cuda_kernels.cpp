#include "fiber_cuda_kernels.h"

#include "fiber_block.h"
#include "kernels/cuda/attention_backward_launches.h"
#include "kernels/cuda/attention_forward_launches.h"
#include "kernels/reference/attention_reference.h"

namespace torch_ext::testing {
namespace {

std::size_t forward_workspace(const AttentionForwardParams& params, int /*num_workers*/) {
  return cuda::schedule_forward(params).total_bytes;
}

KernelPath forward(const AttentionForwardParams& params, const TaskRunner& /*runner*/,
                   void* workspace) {
  const cuda::CudaForwardSchedule schedule = cuda::schedule_forward(params);
  if (schedule.path == cuda::CudaPath::kEmpty) {  // the operators' part
    attention_forward_reference(params);
    return "cuda.empty";
  }
  return cuda::launch_forward(schedule, workspace, FiberLauncher());
}

/// Of an H100.
constexpr std::size_t kSharedLimit = 227 * 1024;

template <bool kDeterministic>
std::size_t backward_workspace(const AttentionBackwardParams& params, int /*num_workers*/) {
  return cuda::schedule_backward(params, {kDeterministic, kSharedLimit}).total_bytes;
}

template <bool kDeterministic>
KernelPath backward(const AttentionBackwardParams& params, const TaskRunner& /*runner*/,
                    void* workspace) {
  const cuda::CudaBackwardSchedule schedule =
      cuda::schedule_backward(params, {kDeterministic, kSharedLimit});
  if (schedule.path == cuda::CudaPath::kEmpty) {
    attention_backward_reference(params);
    return "cuda.empty";
  }
  return cuda::launch_backward(schedule, workspace, FiberLauncher());
}

template <bool kDeterministic>
KernelTable fiber_table() {
  KernelTable table{};
  table.capability = CpuCapability::kDefault;
  table.attention_forward_workspace = forward_workspace;
  table.attention_forward = forward;
  table.attention_backward_workspace = backward_workspace<kDeterministic>;
  table.attention_backward = backward<kDeterministic>;
  return table;
}

}  // namespace

const KernelTable kFiberCudaKernels = fiber_table<false>();
const KernelTable kFiberDeterministicCudaKernels = fiber_table<true>();

}  // namespace torch_ext::testing
