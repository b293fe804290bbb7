// adamw_step_ and sgd_step_ on the CPU.
#include <torch/library.h>

#include <vector>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "accumulation_operators.h"
#include "list_entries.h"

namespace torch_ext {
namespace {

const at::Tensor* tensor_of(const at::Tensor& lr) { return &lr; }
const at::Tensor* tensor_of(double) { return nullptr; }

double number_of(const at::Tensor& lr) { return lr.item<double>(); }
double number_of(double lr) { return lr; }

template <typename Lr>
void adamw_step_cpu(at::TensorList params, at::TensorList accumulators, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
                    at::TensorList master_params, at::TensorList steps, Lr lr, double beta1,
                    double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad,
                    bool maximize, const OptionalTensor& coefficient,
                    const OptionalTensor& found_inf, bool reset) {
  const AdamArguments arguments{.step = {"adamw_step_", params, accumulators, master_params,
                                         tensor_of(lr), given(coefficient), given(found_inf)},
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
  const double rate = number_of(lr);
  check_not_negative("adamw_step_", "lr", rate);
  LoopArena arena;
  std::vector<AdamEntry> entries(params.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const at::Tensor* master = master_of(arguments.step, i);
    const at::Tensor* largest = amsgrad ? &max_exp_avg_sqs[i] : nullptr;
    entries[i] = {.count = params[i].numel(),
                  .param = operand(params[i]),
                  .accumulator = operand(accumulators[i]),
                  .exp_avg = operand(exp_avgs[i]),
                  .exp_avg_sq = operand(exp_avg_sqs[i]),
                  .max_exp_avg_sq = operand(largest),
                  .master = operand(master),
                  .loop = arena.loop_of({&params[i], &accumulators[i], &exp_avgs[i],
                                         &exp_avg_sqs[i], largest, master}),
                  .step = operand(steps[i])};
    elements += entries[i].count;
  }
  const AdamParams kernel_params{.entries = entries.data(),
                                 .num_entries = static_cast<std::int64_t>(entries.size()),
                                 .settings = {.lr = rate,
                                              .weight_decay = weight_decay,
                                              .maximize = maximize,
                                              .reset = reset,
                                              .coefficient = const_operand(given(coefficient)),
                                              .found_inf = const_operand(given(found_inf))},
                                 .beta1 = beta1,
                                 .beta2 = beta2,
                                 .eps = eps,
                                 .decoupled = decoupled,
                                 .amsgrad = amsgrad};
  kernel_table().adam_step(kernel_params, AtenTaskRunner(list_workers(elements)));
}

template <typename Lr>
void sgd_step_cpu(at::TensorList params, at::TensorList accumulators,
                  at::TensorList momentum_buffers, at::TensorList master_params, Lr lr,
                  double momentum, double dampening, double weight_decay, bool nesterov,
                  bool maximize, c10::List<bool> first_step, const OptionalTensor& coefficient,
                  const OptionalTensor& found_inf, bool reset) {
  const SgdArguments arguments{.step = {"sgd_step_", params, accumulators, master_params,
                                        tensor_of(lr), given(coefficient), given(found_inf)},
                               .momentum_buffers = momentum_buffers,
                               .momentum = momentum,
                               .dampening = dampening,
                               .weight_decay = weight_decay,
                               .nesterov = nesterov,
                               .first_steps = first_step.size()};
  check_sgd(arguments);
  const double rate = number_of(lr);
  check_not_negative("sgd_step_", "lr", rate);
  LoopArena arena;
  std::vector<SgdEntry> entries(params.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const at::Tensor* master = master_of(arguments.step, i);
    const at::Tensor* buffer = momentum_buffers.empty() ? nullptr : &momentum_buffers[i];
    entries[i] = {.count = params[i].numel(),
                  .param = operand(params[i]),
                  .accumulator = operand(accumulators[i]),
                  .momentum_buffer = operand(buffer),
                  .master = operand(master),
                  .loop = arena.loop_of({&params[i], &accumulators[i], buffer, master}),
                  .first_step = !first_step.empty() && first_step.get(i)};
    elements += entries[i].count;
  }
  const SgdParams kernel_params{.entries = entries.data(),
                                .num_entries = static_cast<std::int64_t>(entries.size()),
                                .settings = {.lr = rate,
                                             .weight_decay = weight_decay,
                                             .maximize = maximize,
                                             .reset = reset,
                                             .coefficient = const_operand(given(coefficient)),
                                             .found_inf = const_operand(given(found_inf))},
                                .momentum = momentum,
                                .dampening = dampening,
                                .nesterov = nesterov};
  kernel_table().sgd_step(kernel_params, AtenTaskRunner(list_workers(elements)));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("adamw_step_", TORCH_FN(adamw_step_cpu<double>));
  m.impl("adamw_step_.tensor_lr", TORCH_FN(adamw_step_cpu<const at::Tensor&>));
  m.impl("sgd_step_", TORCH_FN(sgd_step_cpu<double>));
  m.impl("sgd_step_.tensor_lr", TORCH_FN(sgd_step_cpu<const at::Tensor&>));
}

}  // namespace torch_ext
