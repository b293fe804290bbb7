// SASS AttentionScalarGradQueryProgram: FFMA|DFMA LDS STS
// SASS AttentionScalarGradKeysProgram: FFMA|DFMA LDS STS
// SASS AttentionScalarMaskGradientProgram: FFMA|DFMA LDS STS
#include "attention_mask_gradient.cuh"
#include "attention_programs.cuh"
#include "attention_scalar_backward.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionScalarGradQueryProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradKeysProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionScalarMaskGradientProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradQueryProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradKeysProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionScalarMaskGradientProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradQueryProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradKeysProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionScalarMaskGradientProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionScalarGradQueryProgram<double, double>);
TORCH_EXT_LAUNCH(AttentionScalarGradKeysProgram<double, double>);
TORCH_EXT_LAUNCH(AttentionScalarMaskGradientProgram<double, double>);

}  // namespace torch_ext::cuda
