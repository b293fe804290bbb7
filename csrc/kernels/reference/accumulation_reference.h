// Slow oracles of the mini-batch kernels in double precision, one element at a time. Same params,
// every dtype, layout and feature.
#pragma once

#include "../accumulation_params.h"

namespace torch_ext {

void accumulate_reference(const AccumulateParams& params);
void grad_stats_reference(const GradStatsParams& params);
void adam_step_reference(const AdamParams& params);
void sgd_step_reference(const SgdParams& params);
void weight_gradient_reference(const WeightGradientParams& params);
void embedding_gradient_reference(const EmbeddingGradientParams& params);

}  // namespace torch_ext
