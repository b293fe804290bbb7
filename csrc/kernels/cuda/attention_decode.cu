// SASS AttentionDecodeProgram: HMMA LDGSTS.*128 LDSM
// SASS AttentionCombineProgram: LDG STG
#include "attention_combine.cuh"
#include "attention_decode_tile.cuh"
#include "attention_programs.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(AttentionDecodeProgram<Bf16, 64>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Bf16, 128>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Bf16, 256>);
TORCH_EXT_LAUNCH(AttentionCombineProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Fp16, 64>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Fp16, 128>);
TORCH_EXT_LAUNCH(AttentionDecodeProgram<Fp16, 256>);
TORCH_EXT_LAUNCH(AttentionCombineProgram<Fp16, float>);

}  // namespace torch_ext::cuda
