#include "gradient_accumulator_noise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace torch_ext {
namespace {

// Each single window's estimate is noisy, and their ratio more so: the two are averaged over about
// the last 20 windows before they are divided.
constexpr double kDecay = 0.95;

}  // namespace

void GradientNoise::update(const at::Tensor& small, const at::Tensor& small_batch,
                           const at::Tensor& large, const at::Tensor& large_batch,
                           const at::Tensor& found_inf) {
  const at::Tensor difference = large_batch - small_batch;
  // Unbiased: of the true gradient's squared norm, and of the trace of the covariance of the
  // gradients of single units of weight.
  const at::Tensor signal = (large_batch * large - small_batch * small) / difference;
  const at::Tensor noise = (small - large) * small_batch * large_batch / difference;
  const at::Tensor estimate = at::stack({noise, signal});
  if (!means_.defined()) means_ = at::zeros({2}, estimate.options());
  const at::Tensor counts =
      at::isfinite(estimate).all().logical_and(difference > 0).logical_and(found_inf == 0);
  means_ = at::where(counts, means_ * kDecay + estimate * (1.0 - kDecay), means_);
}

at::Tensor GradientNoise::scale() const {
  if (!means_.defined()) {
    return at::full({}, std::numeric_limits<double>::quiet_NaN(), at::TensorOptions(at::kDouble));
  }
  return means_.select(0, 0) / means_.select(0, 1);
}

}  // namespace torch_ext
