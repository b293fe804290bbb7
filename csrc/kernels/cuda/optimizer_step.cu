// SASS AdamStepProgram: LDG.E.128 STG.E.128
// SASS SgdStepProgram: LDG.E.128 STG.E.128
#include "accumulation_kernels.h"
#include "list_block.cuh"
#include "optimizer_step_launch.h"

namespace torch_ext::cuda {

std::size_t adam_step_workspace(const AdamParams& params) { return adam_workspace(params); }

cudaError_t adam_step(const AdamParams& params, void* workspace, cudaStream_t stream) {
  return launch_adam_step(StreamLauncher<ListBlock>{stream}, params, workspace);
}

cudaError_t sgd_step(const SgdParams& params, cudaStream_t stream) {
  return launch_sgd_step(StreamLauncher<ListBlock>{stream}, params);
}

}  // namespace torch_ext::cuda
