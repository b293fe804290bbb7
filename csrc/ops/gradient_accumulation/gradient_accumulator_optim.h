// The sums of a window as a step of LibTorch's optimizers.
#pragma once

#include <vector>

#include "gradient_accumulator_core.h"

namespace torch::optim {
class Optimizer;
}

namespace torch_ext {

/// Refuses those that do not hold the core's parameters, hold others, or hold one twice.
void check_optimizers(const std::vector<torch::optim::Optimizer*>& optimizers,
                      const AccumulatorCore& core);

/// AdamW, Adam and SGD fused; others through .grad. Each steps its own parameters.
void step_optimizers(const std::vector<torch::optim::Optimizer*>& optimizers, AccumulatorCore& core,
                     const StepScale& scale);

}  // namespace torch_ext
