// The small kernels around the tiles.
// SASS TileMapProgram: LDG.*U8 VOTE
// SASS DropoutMaskProgram: IMAD STG
// SASS AttentionRowStatsProgram: LDG SHFL
// SASS AttentionGradQuerySumProgram: LDG STG
// SASS AttentionMaskSumProgram: LDG STG
#include "attention_grad_query_sum.cuh"
#include "attention_mask_gradient.cuh"
#include "attention_programs.cuh"
#include "attention_row_stats.cuh"
#include "fragment_layout_check.cuh"
#include "tile_map.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(TileMapProgram);
TORCH_EXT_LAUNCH(DropoutMaskProgram);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<double, double>);
TORCH_EXT_LAUNCH(AttentionGradQuerySumProgram<Bf16>);
TORCH_EXT_LAUNCH(AttentionGradQuerySumProgram<Fp16>);
TORCH_EXT_LAUNCH(AttentionMaskSumProgram<float>);
TORCH_EXT_LAUNCH(AttentionMaskSumProgram<double>);

}  // namespace torch_ext::cuda
