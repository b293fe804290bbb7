#include "list_params.h"

#include "list_entries.h"

namespace torch_ext {
namespace {

OptimizerSettings settings_of(const StepArguments& step, const StepSwitches& switches,
                              double weight_decay) {
  return {.lr = switches.lr,
          .weight_decay = weight_decay,
          .maximize = switches.maximize,
          .reset = switches.reset,
          .coefficient = const_operand(step.coefficient),
          .found_inf = const_operand(step.found_inf),
          .device_lr = switches.device_lr};
}

}  // namespace

AccumulateList::AccumulateList(at::TensorList accumulators, at::TensorList grads, double beta,
                               const at::Tensor* scale)
    : ListParams(accumulators.size()) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const at::Tensor& accumulator = accumulators[i];
    entries_[i] = {.count = accumulator.numel(),
                   .accumulator = operand(accumulator),
                   .grad = const_operand(grads[i]),
                   .loop = arena_.loop_of({&accumulator, &grads[i]})};
    elements += entries_[i].count;
  }
  params.beta = beta;
  params.scale = const_operand(scale);
}

GradStatsList::GradStatsList(at::TensorList grads) : ListParams(grads.size()) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    entries_[i] = {.count = grads[i].numel(),
                   .grad = const_operand(grads[i]),
                   .loop = arena_.loop_of({&grads[i]})};
    elements += entries_[i].count;
  }
}

AdamList::AdamList(const AdamArguments& arguments, const StepSwitches& switches, bool decoupled)
    : ListParams(arguments.step.params.size()) {
  const StepArguments& step = arguments.step;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const at::Tensor& param = step.params[i];
    const at::Tensor* master = master_of(step, i);
    const at::Tensor* largest = arguments.amsgrad ? &arguments.max_exp_avg_sqs[i] : nullptr;
    entries_[i] = {.count = param.numel(),
                   .param = operand(param),
                   .accumulator = operand(step.accumulators[i]),
                   .exp_avg = operand(arguments.exp_avgs[i]),
                   .exp_avg_sq = operand(arguments.exp_avg_sqs[i]),
                   .max_exp_avg_sq = operand(largest),
                   .master = operand(master),
                   .loop = arena_.loop_of({&param, &step.accumulators[i], &arguments.exp_avgs[i],
                                           &arguments.exp_avg_sqs[i], largest, master}),
                   .step = operand(arguments.steps[i])};
    elements += entries_[i].count;
  }
  params.settings = settings_of(step, switches, arguments.weight_decay);
  params.beta1 = arguments.beta1;
  params.beta2 = arguments.beta2;
  params.eps = arguments.eps;
  params.decoupled = decoupled;
  params.amsgrad = arguments.amsgrad;
}

SgdList::SgdList(const SgdArguments& arguments, const StepSwitches& switches,
                 const c10::List<bool>& first_step)
    : ListParams(arguments.step.params.size()) {
  const StepArguments& step = arguments.step;
  const at::TensorList buffers = arguments.momentum_buffers;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const at::Tensor& param = step.params[i];
    const at::Tensor* master = master_of(step, i);
    const at::Tensor* buffer = buffers.empty() ? nullptr : &buffers[i];
    entries_[i] = {.count = param.numel(),
                   .param = operand(param),
                   .accumulator = operand(step.accumulators[i]),
                   .momentum_buffer = operand(buffer),
                   .master = operand(master),
                   .loop = arena_.loop_of({&param, &step.accumulators[i], buffer, master}),
                   .first_step = !first_step.empty() && first_step.get(i)};
    elements += entries_[i].count;
  }
  params.settings = settings_of(step, switches, arguments.weight_decay);
  params.momentum = arguments.momentum;
  params.dampening = arguments.dampening;
  params.nesterov = arguments.nesterov;
}

}  // namespace torch_ext
