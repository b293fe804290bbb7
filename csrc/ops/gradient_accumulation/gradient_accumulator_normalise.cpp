// From the sums of a window to the coefficient of its step. Everything stays on the device: nothing
// waits for it.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "gradient_accumulator_calls.h"
#include "gradient_accumulator_core.h"

namespace torch_ext {
namespace {

// As torch.nn.utils.clip_grad_norm_ has it.
constexpr double kClipEpsilon = 1e-6;

}  // namespace

GradStatsResult call_grad_stats(at::TensorList grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::grad_stats", "")
                             .typed<GradStatsResult(at::TensorList)>();
  return op.call(grads);
}

void AccumulatorCore::check_steppable(bool is_alone) {
  check_intact();
  buffers_.follow_params();
  TORCH_CHECK(!open_,
              "torch_ext::GradientAccumulator: step() inside a micro_batch(): end it first");
  if (!is_alone) return;
  TORCH_CHECK(micro_batches_ > 0,
              "torch_ext::GradientAccumulator: step() takes at least one micro-batch, got none");
}

StepScale AccumulatorCore::nothing() const {
  const at::Tensor zero = at::zeros({}, at::TensorOptions(at::kFloat).device(device()));
  return {zero, at::ones({}, zero.options().dtype(at::kDouble)), zero};
}

SumStatistics AccumulatorCore::measure() const {
  const at::NoGradGuard no_grad;
  if (written().empty()) return {nothing().norm, nothing().found_inf};
  auto [norm, norms, found_inf] = call_grad_stats(buffers_.sums(buffers_.written()));
  return {norm.to(device()), found_inf.to(device())};
}

StepScale AccumulatorCore::normalise(const SumStatistics& statistics, const at::Tensor& weight,
                                     const at::Tensor& first_micro_batch, double multiplier,
                                     const std::optional<at::Tensor>& inverse_scale,
                                     std::optional<double> max_norm) {
  const at::NoGradGuard no_grad;
  // Of a loss: what GradScaler and an averaging reduction have multiplied it by.
  at::Tensor unscale = at::full({}, multiplier, weight.options());
  if (inverse_scale.has_value()) unscale = unscale * inverse_scale->to(device(), at::kDouble);
  at::Tensor coefficient = unscale / weight;
  const at::Tensor norm = statistics.norm.to(at::kDouble) * coefficient;
  // No weight at all gives a norm that is not finite either.
  const at::Tensor found_inf =
      at::where(at::isfinite(norm), statistics.found_inf, at::ones_like(statistics.found_inf));
  if (max_norm.has_value()) {
    coefficient = coefficient * (*max_norm / (norm + kClipEpsilon)).clamp_max(1.0);
  }
  if (first_square_.defined() || micro_batches_ == 0) {
    const at::Tensor small_batch = first_micro_batch.select(0, 1);
    const at::Tensor small = first_micro_batch.select(0, 0) * (unscale / small_batch).square();
    noise_.update(small, small_batch, norm.square(), weight, found_inf);
  }
  return {norm.to(statistics.norm.scalar_type()), coefficient, found_inf};
}

}  // namespace torch_ext
