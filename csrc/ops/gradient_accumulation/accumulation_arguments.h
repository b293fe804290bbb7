// The arguments of the mini-batch operators, gathered, and every refusal of a bad one, shared by
// all devices and the symbolic shapes. Nothing is written before these have passed.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../optional_tensor.h"
#include "memory_overlap.h"

namespace torch_ext {

void check_accumulate(at::TensorList accumulators, at::TensorList grads, const at::Tensor* scale);

void check_grad_stats(at::TensorList grads);

/// The dtype of norm and norms.
at::ScalarType norm_type(at::TensorList grads);

struct WeightGradientArguments {
  const at::Tensor& weight_grad;  // (out_features, in_features)
  const at::Tensor* bias_grad;    // (out_features)
  const at::Tensor& grad_output;  // (tokens..., out_features)
  const at::Tensor& input;        // (tokens..., in_features)
};

void check_weight_gradient(const WeightGradientArguments& arguments);

/// Everything but the values of the indices.
void check_embedding_gradient(const at::Tensor& weight_grad, const at::Tensor& indices,
                              const at::Tensor& grad_output);

/// What adamw_step_ and sgd_step_ share.
struct StepArguments {
  const char* op;
  at::TensorList params;
  at::TensorList accumulators;
  at::TensorList master_params;  // empty, or one for each param: an empty tensor where it has none
  const at::Tensor* lr;          // null: a number
  const at::Tensor* coefficient;
  const at::Tensor* found_inf;
};

struct AdamArguments {
  StepArguments step;
  at::TensorList exp_avgs;
  at::TensorList exp_avg_sqs;
  at::TensorList max_exp_avg_sqs;  // empty unless amsgrad
  at::TensorList steps;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool amsgrad;
};

struct SgdArguments {
  StepArguments step;
  at::TensorList momentum_buffers;  // empty without momentum
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  std::size_t first_steps;  // length of first_step
};

void check_adam(const AdamArguments& arguments);
void check_sgd(const SgdArguments& arguments);

/// A number that is neither negative nor NaN.
void check_not_negative(const char* op, const char* name, double value);

/// After what names the argument: forward-mode derivatives are raised, never dropped.
inline constexpr const char* kNoForwardMode =
    " has a tangent: forward-mode automatic differentiation is not supported; use reverse mode "
    "(backward(), torch.autograd.grad, torch.func.grad, vjp or jacrev)";

/// The master of a param, or null.
inline const at::Tensor* master_of(const StepArguments& arguments, std::size_t index) {
  if (arguments.master_params.empty()) return nullptr;
  const at::Tensor& master = arguments.master_params[index];
  return master.sym_numel() == 0 && arguments.params[index].sym_numel() != 0 ? nullptr : &master;
}

}  // namespace torch_ext
