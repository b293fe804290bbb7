// The same training with each batch in micro-batches, through torch_ext::GradientAccumulator.
#pragma once

#include <vector>

#include "transformer.h"

/// The loss of every step. Half-way, in the middle of a window, everything is saved and training
/// goes on with what was loaded.
std::vector<double> train_in_micro_batches(const Attention& attention, int64_t steps,
                                           int64_t seq_len);
