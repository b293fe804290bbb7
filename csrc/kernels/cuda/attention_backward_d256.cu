// SASS AttentionBackwardKeysProgram<torch_ext::cuda::Bf16, 256, true>: HMMA LDGSTS.*128 LDSM
// SASS AttentionBackwardKeysProgram<torch_ext::cuda::Fp16, 256, true>: HMMA LDGSTS.*128 LDSM
// SASS AttentionGradQueryProgram<torch_ext::cuda::Bf16, 256>: HMMA LDGSTS.*128 LDSM
// SASS AttentionGradQueryProgram<torch_ext::cuda::Fp16, 256>: HMMA LDGSTS.*128 LDSM
// SASS AttentionMaskGradientProgram<torch_ext::cuda::Bf16, 256>: HMMA LDGSTS.*128 LDSM
// SASS AttentionMaskGradientProgram<torch_ext::cuda::Fp16, 256>: HMMA LDGSTS.*128 LDSM
#include "attention_backward_keys.cuh"
#include "attention_mask_gradient.cuh"
#include "attention_programs.cuh"
#include "attention_score_gradients.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionBackwardKeysProgram<Bf16, 256, true>);
TORCH_EXT_LAUNCH(AttentionGradQueryProgram<Bf16, 256>);
TORCH_EXT_LAUNCH(AttentionMaskGradientProgram<Bf16, 256>);
TORCH_EXT_LAUNCH(AttentionBackwardKeysProgram<Fp16, 256, true>);
TORCH_EXT_LAUNCH(AttentionGradQueryProgram<Fp16, 256>);
TORCH_EXT_LAUNCH(AttentionMaskGradientProgram<Fp16, 256>);

}  // namespace torch_ext::cuda
