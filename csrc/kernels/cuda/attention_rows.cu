// The small kernels around the tiles.
// SASS TileMapProgram: LDG.*U8 VOTE
// SASS DropoutMaskProgram: IMAD STG
// SASS AttentionRowStatsProgram: LDG SHFL
// SASS AttentionTileRowStatsProgram<torch_ext::cuda::Bf16>: HMMA LDGSTS.*128 LDSM
// SASS AttentionTileRowStatsProgram<torch_ext::cuda::Fp16>: HMMA LDGSTS.*128 LDSM
// SASS AttentionTileRowStatsProgram<torch_ext::cuda::Tf32>: HMMA.*TF32 LDGSTS.*128 LDSM
// SASS AttentionGradQuerySumProgram: LDG STG
// SASS AttentionMaskSumProgram: LDG STG
#include "attention_grad_query_sum.cuh"
#include "attention_mask_gradient.cuh"
#include "attention_programs.cuh"
#include "attention_row_stats.cuh"
#include "attention_tile_row_stats.cuh"
#include "fragment_layout_check.cuh"
#include "tile_map.cuh"

namespace torch_ext::cuda {

TORCH_EXT_LAUNCH(TileMapProgram);
TORCH_EXT_LAUNCH(DropoutMaskProgram);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<Bf16, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<Fp16, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<float, float>);
TORCH_EXT_LAUNCH(AttentionRowStatsProgram<double, double>);
TORCH_EXT_LAUNCH(AttentionTileRowStatsProgram<Bf16>);
TORCH_EXT_LAUNCH(AttentionTileRowStatsProgram<Fp16>);
TORCH_EXT_LAUNCH(AttentionTileRowStatsProgram<Tf32>);
TORCH_EXT_LAUNCH(AttentionGradQuerySumProgram<Bf16>);
TORCH_EXT_LAUNCH(AttentionGradQuerySumProgram<Fp16>);
TORCH_EXT_LAUNCH(AttentionMaskSumProgram<float>);
TORCH_EXT_LAUNCH(AttentionMaskSumProgram<double>);

}  // namespace torch_ext::cuda
