#include "explicit_attention.h"

#include <torch/torch.h>

#include <cmath>
#include <limits>

namespace torch_ext::testing {

at::Tensor explicit_attention(const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const std::optional<at::Tensor>& mask,
                              bool is_causal, std::optional<double> scale) {
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))));
  const std::int64_t group = query.size(1) / key.size(1);
  const at::Tensor keys = key.repeat_interleave(group, 1);
  const at::Tensor values = value.repeat_interleave(group, 1);
  at::Tensor scores = at::matmul(query, keys.transpose(-2, -1)) * factor;
  at::Tensor excluded = at::zeros_like(scores, at::kBool);
  if (mask.has_value()) {
    if (mask->scalar_type() == at::kBool) {
      excluded = excluded.logical_or(mask->logical_not());
    } else {
      scores = scores + *mask;
    }
  }
  if (is_causal) {
    const at::Tensor attended = at::ones({query.size(-2), key.size(-2)}, at::kBool).tril();
    excluded = excluded.logical_or(attended.logical_not());
  }
  scores = scores.masked_fill(excluded, -std::numeric_limits<double>::infinity());
  const at::Tensor empty = excluded.all(-1, /*keepdim=*/true);
  const at::Tensor weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0);
  return at::matmul(weights, values);
}

at::Tensor random_leaf(at::IntArrayRef sizes, at::ScalarType type) {
  return at::randn(sizes, at::kDouble).to(type).requires_grad_();
}

double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor reference = expected.detach().to(at::kDouble);
  const double norm = reference.norm().item<double>();
  const double error = (actual.detach().to(at::kDouble) - reference).norm().item<double>();
  return norm == 0.0 ? error : error / norm;
}

std::vector<at::Tensor> gradients(const at::Tensor& out, const std::vector<at::Tensor>& inputs,
                                  const at::Tensor& weights) {
  return torch::autograd::grad({out}, inputs, {weights});
}

}  // namespace torch_ext::testing
