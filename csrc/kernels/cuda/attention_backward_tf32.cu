// SASS AttentionBackwardKeysProgram<torch_ext::cuda::Tf32, 64, true>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionBackwardKeysProgram<torch_ext::cuda::Tf32, 128, true>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionGradQueryProgram<torch_ext::cuda::Tf32, 64>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionGradQueryProgram<torch_ext::cuda::Tf32, 128>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionMaskGradientProgram<torch_ext::cuda::Tf32, 64>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionMaskGradientProgram<torch_ext::cuda::Tf32, 128>: HMMA.*TF32 LDGSTS.*128 LDSM
#include "attention_backward_keys.cuh"
#include "attention_grad_query_sum.cuh"
#include "attention_mask_gradient.cuh"
#include "attention_programs.cuh"
#include "attention_score_gradients.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionBackwardKeysProgram<Tf32, 64, true>);
TORCH_EXT_LAUNCH(AttentionBackwardKeysProgram<Tf32, 128, true>);
TORCH_EXT_LAUNCH(AttentionGradQueryProgram<Tf32, 64>);
TORCH_EXT_LAUNCH(AttentionGradQueryProgram<Tf32, 128>);
TORCH_EXT_LAUNCH(AttentionMaskGradientProgram<Tf32, 64>);
TORCH_EXT_LAUNCH(AttentionMaskGradientProgram<Tf32, 128>);
TORCH_EXT_LAUNCH(AttentionGradQuerySumProgram<Tf32>);

}  // namespace torch_ext::cuda
