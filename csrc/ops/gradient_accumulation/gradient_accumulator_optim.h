// The sums of a window as a step of LibTorch's optimizers.
#pragma once

#include "gradient_accumulator_core.h"

namespace torch::optim {
class Optimizer;
}

namespace torch_ext {

/// Refuses one that does not hold the core's parameters, or holds others.
void check_optimizer(const torch::optim::Optimizer& optimizer, const AccumulatorCore& core);

/// AdamW, Adam and SGD fused; others through .grad.
void step_optimizer(torch::optim::Optimizer& optimizer, AccumulatorCore& core,
                    const StepScale& scale);

}  // namespace torch_ext
