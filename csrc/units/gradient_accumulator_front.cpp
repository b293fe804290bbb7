// The C++ GradientAccumulator. One translation unit (csrc/README.md).
#include "ops/gradient_accumulation/gradient_accumulator.cpp"
#include "ops/gradient_accumulation/gradient_accumulator_clipping.cpp"
#include "ops/gradient_accumulation/gradient_accumulator_optim.cpp"
#include "ops/gradient_accumulation/gradient_accumulator_visible.cpp"
