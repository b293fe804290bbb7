// The programs of optimizer_step_program.h in order, for a caller's list.
#pragma once

#include <cstddef>
#include <cstdint>

#include "list_launch.h"
#include "optimizer_step_program.h"

namespace torch_ext::cuda {

inline StepScalars step_scalars(const OptimizerSettings& settings) {
  return {settings.coefficient, settings.found_inf, settings.maximize, settings.reset};
}

inline std::size_t adam_workspace(const AdamParams& params) {
  return static_cast<std::size_t>(params.num_entries) * sizeof(AdamCorrections);
}

template <typename Launcher>
typename Launcher::Status launch_adam_step(const Launcher& launcher, const AdamParams& params,
                                           void* workspace) {
  const OptimizerSettings& settings = params.settings;
  // Adam without weight decay takes AdamW's path with a factor of 1: 0 * inf must not come in.
  const AdamSettings adam{params.beta1, params.beta2, params.eps,
                          params.decoupled || settings.weight_decay == 0.0, params.amsgrad};
  auto* const corrections = static_cast<AdamCorrections*>(workspace);

  const auto count_of = [&](std::int64_t i) {
    const Operand& step = params.entries[i].step;
    return ListItem<1>{{step.data}, {step.type}, 0, {}, false};
  };
  const auto status = launch_list_program<AdamCountProgram>(
      launcher, params.num_entries, count_of, [&](auto& args) {
        args.settings = adam;
        args.scalars = step_scalars(settings);
        args.lr = settings.lr;
        args.device_lr = settings.device_lr;
        args.weight_decay = settings.weight_decay;
        args.corrections = corrections;
      });
  if (status != Launcher::kSuccess) return status;

  const auto item_of = [&](std::int64_t i) {
    const AdamEntry& entry = params.entries[i];
    return ListItem<kAdamOperands>{
        {entry.param.data, entry.accumulator.data, entry.exp_avg.data, entry.exp_avg_sq.data,
         params.amsgrad ? entry.max_exp_avg_sq.data : nullptr, entry.master.data},
        {entry.param.type, entry.accumulator.type, entry.exp_avg.type, entry.exp_avg_sq.type,
         entry.max_exp_avg_sq.type, entry.master.type},
        entry.count,
        entry.loop,
        false};
  };
  return launch_list_program<AdamStepProgram>(launcher, params.num_entries, item_of,
                                              [&](auto& args) {
                                                args.settings = adam;
                                                args.scalars = step_scalars(settings);
                                                args.corrections = corrections;
                                              });
}

template <typename Launcher>
typename Launcher::Status launch_sgd_step(const Launcher& launcher, const SgdParams& params) {
  const OptimizerSettings& settings = params.settings;
  const auto item_of = [&](std::int64_t i) {
    const SgdEntry& entry = params.entries[i];
    return ListItem<kSgdOperands>{
        {entry.param.data, entry.accumulator.data, entry.momentum_buffer.data, entry.master.data},
        {entry.param.type, entry.accumulator.type, entry.momentum_buffer.type, entry.master.type},
        entry.count,
        entry.loop,
        entry.first_step};
  };
  return launch_list_program<SgdStepProgram>(
      launcher, params.num_entries, item_of, [&](auto& args) {
        args.settings = {settings.weight_decay, params.momentum, params.dampening, params.nesterov};
        args.scalars = step_scalars(settings);
        args.lr = settings.lr;
        args.device_lr = settings.device_lr;
      });
}

}  // namespace torch_ext::cuda
