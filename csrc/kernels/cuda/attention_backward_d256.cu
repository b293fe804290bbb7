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
