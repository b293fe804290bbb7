// SASS ChunkNormProgram: LDG.E.128
#include "accumulation_kernels.h"
#include "gradient_norm_launch.h"
#include "list_block.cuh"

namespace torch_ext::cuda {

std::size_t grad_stats_workspace(const GradStatsParams& params) { return norm_workspace(params); }

cudaError_t grad_stats(const GradStatsParams& params, void* workspace, cudaStream_t stream) {
  return launch_norms(StreamLauncher<ListBlock>{stream}, params, workspace);
}

}  // namespace torch_ext::cuda
