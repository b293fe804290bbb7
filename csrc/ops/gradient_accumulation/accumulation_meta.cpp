// The mini-batch operators without memory to work on: the same refusals, and shapes. On meta
// tensors, for lists of nothing, which have no device, and on devices without kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "accumulation_operators.h"

namespace torch_ext {
namespace {

void grad_accumulate_meta(at::TensorList accumulators, at::TensorList grads, double,
                          const OptionalTensor& scale) {
  check_accumulate(accumulators, grads, given(scale));
}

GradStatsResult grad_stats_meta(at::TensorList grads) {
  check_grad_stats(grads);
  const auto options = at::TensorOptions()
                           .device(grads.empty() ? c10::Device(at::kCPU) : grads[0].device())
                           .dtype(norm_type(grads));
  return {at::empty({}, options), at::empty({static_cast<std::int64_t>(grads.size())}, options),
          at::empty({}, options.dtype(at::kFloat))};
}

void linear_wgrad_meta(const at::Tensor& weight_grad, const OptionalTensor& bias_grad,
                       const at::Tensor& grad_output, const at::Tensor& input, double) {
  check_weight_gradient({weight_grad, given(bias_grad), grad_output, input});
}

void embedding_wgrad_meta(const at::Tensor& weight_grad, const at::Tensor& indices,
                          const at::Tensor& grad_output, std::int64_t, bool, double) {
  check_embedding_gradient(weight_grad, indices, grad_output);
}

const at::Tensor* checked(const char*, const at::Tensor& lr) { return &lr; }
const at::Tensor* checked(const char* op, double lr) {
  check_not_negative(op, "lr", lr);
  return nullptr;
}

template <typename Lr>
void adamw_step_meta(at::TensorList params, at::TensorList accumulators, at::TensorList exp_avgs,
                     at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                     at::TensorList master_params, at::TensorList steps, Lr lr, double beta1,
                     double beta2, double eps, double weight_decay, bool, bool amsgrad, bool,
                     const OptionalTensor& coefficient, const OptionalTensor& found_inf, bool) {
  check_adam({.step = {"adamw_step_", params, accumulators, master_params,
                       checked("adamw_step_", lr), given(coefficient), given(found_inf)},
              .exp_avgs = exp_avgs,
              .exp_avg_sqs = exp_avg_sqs,
              .max_exp_avg_sqs = max_exp_avg_sqs,
              .steps = steps,
              .beta1 = beta1,
              .beta2 = beta2,
              .eps = eps,
              .weight_decay = weight_decay,
              .amsgrad = amsgrad});
}

template <typename Lr>
void sgd_step_meta(at::TensorList params, at::TensorList accumulators,
                   at::TensorList momentum_buffers, at::TensorList master_params, Lr lr,
                   double momentum, double dampening, double weight_decay, bool nesterov, bool,
                   c10::List<bool> first_step, const OptionalTensor& coefficient,
                   const OptionalTensor& found_inf, bool) {
  check_sgd({.step = {"sgd_step_", params, accumulators, master_params, checked("sgd_step_", lr),
                      given(coefficient), given(found_inf)},
             .momentum_buffers = momentum_buffers,
             .momentum = momentum,
             .dampening = dampening,
             .weight_decay = weight_decay,
             .nesterov = nesterov,
             .first_steps = first_step.size()});
}

void expect_none(const char* op, at::TensorList tensors) {
  if (tensors.empty()) return;
  TORCH_CHECK_NOT_IMPLEMENTED(false, "torch_ext::", op, ": there is no kernel for tensors on ",
                              tensors[0].device(), " in this build");
}

void expect_none(const char* op, const at::Tensor& tensor) {
  expect_none(op, at::TensorList(tensor));
}

/// `kMeta`, and then there must not be anything left to do.
template <typename Op, auto kMeta, typename Signature = typename Op::Signature>
struct OfNothing;

template <typename Op, auto kMeta, typename First, typename... Args>
struct OfNothing<Op, kMeta, void(First, Args...)> {
  static void run(First first, Args... args) {
    kMeta(first, args...);
    expect_none(Op::kName, first);
  }
};

GradStatsResult grad_stats_of_nothing(at::TensorList grads) {
  check_grad_stats(grads);
  expect_none("grad_stats", grads);
  return {at::zeros({}), at::zeros({0}), at::zeros({})};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CompositeExplicitAutograd, m) {
  using AdamwTensorLr = AdamwStep<const at::Tensor&>;
  using SgdTensorLr = SgdStep<const at::Tensor&>;
  m.impl("grad_accumulate_", TORCH_FN((OfNothing<GradAccumulate, grad_accumulate_meta>::run)));
  m.impl("grad_stats", TORCH_FN(grad_stats_of_nothing));
  m.impl("linear_wgrad_", TORCH_FN((OfNothing<LinearWgrad, linear_wgrad_meta>::run)));
  m.impl("embedding_wgrad_", TORCH_FN((OfNothing<EmbeddingWgrad, embedding_wgrad_meta>::run)));
  m.impl("adamw_step_", TORCH_FN((OfNothing<AdamwStep<double>, adamw_step_meta<double>>::run)));
  m.impl("adamw_step_.tensor_lr",
         TORCH_FN((OfNothing<AdamwTensorLr, adamw_step_meta<const at::Tensor&>>::run)));
  m.impl("sgd_step_", TORCH_FN((OfNothing<SgdStep<double>, sgd_step_meta<double>>::run)));
  m.impl("sgd_step_.tensor_lr",
         TORCH_FN((OfNothing<SgdTensorLr, sgd_step_meta<const at::Tensor&>>::run)));
}

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("grad_accumulate_", TORCH_FN(grad_accumulate_meta));
  m.impl("grad_stats", TORCH_FN(grad_stats_meta));
  m.impl("linear_wgrad_", TORCH_FN(linear_wgrad_meta));
  m.impl("embedding_wgrad_", TORCH_FN(embedding_wgrad_meta));
  m.impl("adamw_step_", TORCH_FN(adamw_step_meta<double>));
  m.impl("adamw_step_.tensor_lr", TORCH_FN(adamw_step_meta<const at::Tensor&>));
  m.impl("sgd_step_", TORCH_FN(sgd_step_meta<double>));
  m.impl("sgd_step_.tensor_lr", TORCH_FN(sgd_step_meta<const at::Tensor&>));
}

}  // namespace torch_ext
