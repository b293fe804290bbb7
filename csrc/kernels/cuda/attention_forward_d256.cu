// SASS AttentionForwardProgram<torch_ext::cuda::Bf16, 256, true>: HMMA LDGSTS.*128 LDSM
// SASS AttentionForwardProgram<torch_ext::cuda::Fp16, 256, true>: HMMA LDGSTS.*128 LDSM
#include "attention_forward_tile.cuh"
#include "attention_programs.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionForwardProgram<Bf16, 256, true>);
TORCH_EXT_LAUNCH(AttentionForwardProgram<Fp16, 256, true>);

}  // namespace torch_ext::cuda
