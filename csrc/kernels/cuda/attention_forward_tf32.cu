// SASS AttentionForwardProgram<torch_ext::cuda::Tf32, 64, true>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionForwardProgram<torch_ext::cuda::Tf32, 128, true>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionDecodeProgram<torch_ext::cuda::Tf32, 64>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionDecodeProgram<torch_ext::cuda::Tf32, 128>: HMMA.*TF32 LDGSTS.*128 LDSM
#include "attention_combine.cuh"
#include "attention_decode_tile.cuh"
#include "attention_forward_tile.cuh"
#include "attention_programs.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionForwardProgram<Tf32, 64, true>);
TORCH_EXT_LAUNCH(AttentionForwardProgram<Tf32, 128, true>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Tf32, 64>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Tf32, 128>);
TORCH_EXT_LAUNCH(AttentionCombineProgram<float, float>);

}  // namespace torch_ext::cuda
