// adamw_step_ and sgd_step_ from their arguments to the kernels' params, for a backend that has
//   static StepRate rate(const char* op, const at::Tensor& lr, at::TensorList params);
//   static void step(const AdamList&, at::TensorList params);   and the same for SgdList
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include "accumulation_arguments.h"
#include "list_params.h"

namespace torch_ext {

/// A learning rate: a number, or one in the device's memory.
struct StepRate {
  double number = 0.0;
  ConstOperand on_device{};
};

namespace detail {

inline const at::Tensor* tensor_of(const at::Tensor& lr) { return &lr; }
inline const at::Tensor* tensor_of(double) { return nullptr; }

template <typename Backend>
StepSwitches switches_of(const StepArguments& arguments, double number, bool maximize, bool reset) {
  const StepRate rate = arguments.lr == nullptr
                            ? StepRate{number}
                            : Backend::rate(arguments.op, *arguments.lr, arguments.params);
  check_not_negative(arguments.op, "lr", rate.number);
  return {rate.number, rate.on_device, maximize, reset};
}

inline double number_of(const at::Tensor&) { return 0.0; }
inline double number_of(double lr) { return lr; }

}  // namespace detail

template <typename Backend, typename Lr>
void adamw_step(at::TensorList params, at::TensorList accumulators, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                at::TensorList master_params, at::TensorList steps, Lr lr, double beta1,
                double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad,
                bool maximize, const OptionalTensor& coefficient, const OptionalTensor& found_inf,
                bool reset) {
  const AdamArguments arguments{
      .step = {"adamw_step_", params, accumulators, master_params, detail::tensor_of(lr),
               given(coefficient), given(found_inf)},
      .exp_avgs = exp_avgs,
      .exp_avg_sqs = exp_avg_sqs,
      .max_exp_avg_sqs = max_exp_avg_sqs,
      .steps = steps,
      .beta1 = beta1,
      .beta2 = beta2,
      .eps = eps,
      .weight_decay = weight_decay,
      .amsgrad = amsgrad};
  check_adam(arguments);
  const StepSwitches switches =
      detail::switches_of<Backend>(arguments.step, detail::number_of(lr), maximize, reset);
  Backend::step(AdamList(arguments, switches, decoupled), params);
}

template <typename Backend, typename Lr>
void sgd_step(at::TensorList params, at::TensorList accumulators, at::TensorList momentum_buffers,
              at::TensorList master_params, Lr lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, c10::List<bool> first_step,
              const OptionalTensor& coefficient, const OptionalTensor& found_inf, bool reset) {
  const SgdArguments arguments{
      .step = {"sgd_step_", params, accumulators, master_params, detail::tensor_of(lr),
               given(coefficient), given(found_inf)},
      .momentum_buffers = momentum_buffers,
      .momentum = momentum,
      .dampening = dampening,
      .weight_decay = weight_decay,
      .nesterov = nesterov,
      .first_steps = first_step.size()};
  check_sgd(arguments);
  const StepSwitches switches =
      detail::switches_of<Backend>(arguments.step, detail::number_of(lr), maximize, reset);
  Backend::step(SgdList(arguments, switches, first_step), params);
}

}  // namespace torch_ext
