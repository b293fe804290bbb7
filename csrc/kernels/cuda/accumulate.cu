// SASS AccumulateProgram: LDG.E.128|LDG.E.EF.128 STG.E.128
#include "accumulate_program.h"
#include "accumulation_kernels.h"
#include "list_block.cuh"

namespace torch_ext::cuda {

cudaError_t accumulate(const AccumulateParams& params, cudaStream_t stream) {
  return launch_accumulate(StreamLauncher<ListBlock>{stream}, params);
}

}  // namespace torch_ext::cuda
