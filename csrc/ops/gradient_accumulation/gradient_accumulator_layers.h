// Linear and embedding layers whose backward adds their weights' gradients to an accumulator's
// sums: the gradient itself is never written, in float32 not even rounded.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <optional>

#include "gradient_accumulator_core.h"

namespace torch_ext {

/// at::linear, autocast included. weight_index, bias_index: their places in the core; a bias that
/// needs no gradient has any.
at::Tensor accumulating_linear(const c10::intrusive_ptr<AccumulatorCore>& core,
                               const at::Tensor& input, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, std::int64_t weight_index,
                               std::int64_t bias_index);

/// at::embedding.
at::Tensor accumulating_embedding(const c10::intrusive_ptr<AccumulatorCore>& core,
                                  const at::Tensor& indices, const at::Tensor& weight,
                                  std::int64_t padding_idx, bool scale_grad_by_freq,
                                  std::int64_t weight_index);

}  // namespace torch_ext
