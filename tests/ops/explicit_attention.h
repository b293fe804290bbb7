// What the fused operators are tested against: attention written out in aten operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace torch_ext::testing {

/// query (batch, heads, q_len, head_dim), key and value with as many heads or a divisor of them;
/// mask as in scaled_dot_product_attention. Differentiable.
at::Tensor explicit_attention(const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value,
                              const std::optional<at::Tensor>& mask = std::nullopt,
                              bool is_causal = false, std::optional<double> scale = std::nullopt);

/// A normal tensor that requires grad.
at::Tensor random_leaf(at::IntArrayRef sizes, at::ScalarType type = at::kFloat);

/// The relative error allowed between two float32 results that differ in the order of their sums:
/// 32 roundings, as in tests/python/rounding_bounds.py.
inline constexpr double kSameButForRounding = 32.0 * 0x1p-23;

/// ||actual - expected|| / ||expected||
double relative_error(const at::Tensor& actual, const at::Tensor& expected);

/// Gradients of sum(out * weights) for each input.
std::vector<at::Tensor> gradients(const at::Tensor& out, const std::vector<at::Tensor>& inputs,
                                  const at::Tensor& weights);

}  // namespace torch_ext::testing
