// Clipping of a window's gradient in the C++ front, as torch::nn::utils clips what lies in .grad.
#pragma once

#include <torch_ext/gradient_accumulator.h>

#include "gradient_accumulator_core.h"

namespace torch_ext {

/// What a step takes, clipped by norm. The 2-norm costs nothing, for the step needs it anyway;
/// another one is one more read of the sums.
StepScale clipped_scale(AccumulatorCore& core, const GradientAccumulatorOptions& options);

/// Clips each element of the normalised gradient, one more pass over the sums, where that was asked
/// for; returns the coefficient that is left.
at::Tensor clip_values(AccumulatorCore& core, const GradientAccumulatorOptions& options,
                       const at::Tensor& coefficient);

}  // namespace torch_ext
