// SASS AttentionScalarForwardProgram: FFMA|DFMA LDS STS
#include "attention_programs.cuh"
#include "attention_scalar_forward.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionScalarForwardProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionScalarForwardProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionScalarForwardProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionScalarForwardProgram<double, double>);

}  // namespace torch_ext::cuda
