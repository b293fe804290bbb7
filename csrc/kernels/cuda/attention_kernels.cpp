#include "attention_kernels.h"

#include "attention_backward_launches.h"
#include "attention_forward_launches.h"

namespace torch_ext::cuda {
namespace {

/// Stops at the first error.
struct AttentionStream {
  cudaStream_t stream;
  cudaError_t& status;

  template <typename Program>
  void launch(std::int64_t blocks, const typename Program::Args& args) const {
    if (status == cudaSuccess) status = launch_attention_program<Program>(args, blocks, stream);
  }
  void clear(void* place, std::size_t bytes) const {
    if (status == cudaSuccess) status = cudaMemsetAsync(place, 0, bytes, stream);
  }
};

}  // namespace

AttentionLaunch attention_forward(const CudaForwardSchedule& schedule, void* workspace,
                                  cudaStream_t stream) {
  AttentionLaunch result;
  result.path = launch_forward(schedule, workspace, AttentionStream{stream, result.status});
  return result;
}

AttentionLaunch attention_backward(const CudaBackwardSchedule& schedule, void* workspace,
                                   cudaStream_t stream) {
  AttentionLaunch result;
  result.path = launch_backward(schedule, workspace, AttentionStream{stream, result.status});
  return result;
}

cudaError_t attention_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream) {
  return launch_attention_program<DropoutMaskProgram>(args, DropoutMaskProgram::blocks(args),
                                                      stream);
}

}  // namespace torch_ext::cuda
