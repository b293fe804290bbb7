#include "gradient_accumulator_clipping.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>

#include <vector>

namespace torch_ext {
namespace {

// As torch::nn::utils::clip_grad_norm_ has it.
constexpr double kNormEpsilon = 1e-6;

StepScale normalised(AccumulatorCore& core, std::optional<double> max_norm) {
  return core.normalise(core.measure(), core.weight(), core.first_micro_batch(), /*multiplier=*/1.0,
                        /*inverse_scale=*/std::nullopt, max_norm);
}

/// As torch.nn.utils.get_total_norm: the norm of the tensors' norms.
at::Tensor total_norm(const std::vector<at::Tensor>& tensors, double norm_type) {
  std::vector<at::Tensor> norms;
  norms.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    norms.push_back(at::linalg_vector_norm(tensor, norm_type).to(at::kDouble));
  }
  return at::linalg_vector_norm(at::stack(norms), norm_type);
}

}  // namespace

StepScale clipped_scale(AccumulatorCore& core, const GradientAccumulatorOptions& options) {
  if (core.written().empty()) return core.nothing();
  const double norm_type = options.norm_type();
  if (norm_type == 2.0) return normalised(core, options.max_norm());
  const at::NoGradGuard no_grad;
  StepScale scale = normalised(core, std::nullopt);
  // |c x|_p = c |x|_p, but for p = 0, which counts.
  at::Tensor norm = total_norm(core.sums(core.written()), norm_type).to(core.device());
  if (norm_type != 0.0) norm = norm * scale.coefficient;
  if (options.max_norm().has_value()) {
    const at::Tensor share = *options.max_norm() / (norm + kNormEpsilon);
    scale.coefficient = scale.coefficient * share.clamp_max(1.0);
  }
  scale.norm = norm.to(scale.norm.scalar_type());
  return scale;
}

at::Tensor clip_values(AccumulatorCore& core, const GradientAccumulatorOptions& options,
                       const at::Tensor& coefficient) {
  if (!options.clip_value().has_value() || core.written().empty()) return coefficient;
  const at::NoGradGuard no_grad;
  const double bound = *options.clip_value();
  for (const at::Tensor& sum : core.scale_sums(core.written(), coefficient)) {
    sum.clamp_(-bound, bound);
  }
  return at::ones_like(coefficient);
}

}  // namespace torch_ext
