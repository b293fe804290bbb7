// A window's gradient in .grad, for those who read or edit it before the step.
#pragma once

#include "gradient_accumulator_core.h"

namespace torch_ext {

/// Scales the sums to the gradient of the step and puts them into .grad: from here on the step's
/// coefficient is 1. Where the dtypes agree .grad is the sum itself; a narrower parameter's is a
/// copy.
void show_gradients(AccumulatorCore& core, const at::Tensor& coefficient);

/// The sums become what .grad holds now; .grad keeps it. A sum keeps its own digits but for
/// elements whose copy was edited.
void take_gradients_back(AccumulatorCore& core);

}  // namespace torch_ext
