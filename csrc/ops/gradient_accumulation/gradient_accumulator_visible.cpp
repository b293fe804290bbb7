#include "gradient_accumulator_visible.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/where.h>

#include <vector>

namespace torch_ext {

void show_gradients(AccumulatorCore& core, const at::Tensor& coefficient) {
  const at::NoGradGuard no_grad;
  const std::vector<std::size_t> written = core.written();
  const std::vector<at::Tensor> sums = core.scale_sums(written, coefficient);
  for (const at::Tensor& param : core.params()) param.mutable_grad() = at::Tensor();
  for (std::size_t k = 0; k < written.size(); ++k) {
    const at::Tensor& param = core.param(written[k]);
    param.mutable_grad() = sums[k].to(param.scalar_type());
  }
}

void take_gradients_back(AccumulatorCore& core) {
  const at::NoGradGuard no_grad;
  std::vector<std::size_t> gone;
  for (const std::size_t index : core.written()) {
    if (!core.param(index).grad().defined()) gone.push_back(index);
  }
  core.forget(gone);
  std::vector<std::size_t> present;
  for (std::size_t i = 0; i < core.size(); ++i) {
    if (core.param(i).grad().defined()) present.push_back(i);
  }
  core.check_grads(present);
  core.zero_missing(present);
  const std::vector<at::Tensor> sums = core.sums(present);
  for (std::size_t k = 0; k < present.size(); ++k) {
    const at::Tensor& grad = core.param(present[k]).grad();
    const at::Tensor& sum = sums[k];
    if (grad.is_alias_of(sum) && grad.scalar_type() == sum.scalar_type()) continue;  // in place
    sum.copy_(at::where(sum.to(grad.scalar_type()) == grad, sum, grad.to(sum.scalar_type())));
  }
}

}  // namespace torch_ext
