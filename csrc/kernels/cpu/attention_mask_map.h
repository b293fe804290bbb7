// Classifies the tiles of a boolean mask once per slice that heads and batches share, so that
// kernels skip the empty ones and take the unmasked path through the full ones.
#pragma once

#include "../attention_params.h"
#include "attention_schedule.h"
#include "task_runner.h"

namespace torch_ext {

/// Fills (slices, row_tiles, column_tiles) classes. Row tile t holds the flattened rows
/// [t * row_tile, ...) of `rows_per_query` rows a query.
void build_mask_map(const AttentionMask& mask, const AttentionShape& shape, const MaskMapPlan& plan,
                    std::int64_t rows_per_query, const TaskRunner& runner, TileClass* map);

}  // namespace torch_ext
