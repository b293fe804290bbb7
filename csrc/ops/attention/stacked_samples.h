// What a batching rule does where samples cannot share a call: one after the other.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

namespace torch_ext {

/// Calls `one(index)`, which returns a std::tuple of `kOutputs` tensors, for each sample, and
/// stacks.
template <std::size_t kOutputs, typename One>
std::array<at::Tensor, kOutputs> stack_samples(std::int64_t count, const One& one) {
  TORCH_CHECK(count > 0, "torch_ext: vmap takes at least one sample here, got none");
  std::array<std::vector<at::Tensor>, kOutputs> samples;
  for (std::int64_t index = 0; index < count; ++index) {
    std::apply(
        [&samples](const auto&... outputs) {
          std::size_t position = 0;
          (samples[position++].push_back(outputs), ...);
        },
        one(index));
  }
  std::array<at::Tensor, kOutputs> stacked;
  for (std::size_t output = 0; output < kOutputs; ++output) {
    if (samples[output].front().defined()) stacked[output] = at::stack(samples[output], 0);
  }
  return stacked;
}

}  // namespace torch_ext
