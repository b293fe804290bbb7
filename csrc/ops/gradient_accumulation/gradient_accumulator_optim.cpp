#include "gradient_accumulator_optim.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/api/include/torch/optim/adam.h>
#include <torch/csrc/api/include/torch/optim/adamw.h>
#include <torch/csrc/api/include/torch/optim/lbfgs.h>
#include <torch/csrc/api/include/torch/optim/sgd.h>

#include <memory>
#include <type_traits>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "gradient_accumulator_calls.h"
#include "shared_memory.h"

namespace torch_ext {
namespace {

namespace optim = torch::optim;

constexpr const char* kAccumulator = "torch_ext::GradientAccumulator: ";

/// A group's parameters that have a sum in this window.
struct Members {
  std::vector<std::size_t> indices;
  std::vector<at::Tensor> params;
};

std::vector<Members> members_of(const optim::Optimizer& optimizer, const AccumulatorCore& core) {
  std::unordered_map<const c10::TensorImpl*, std::size_t> places;
  for (const std::size_t index : core.written()) {
    places.emplace(core.param(index).unsafeGetTensorImpl(), index);
  }
  std::vector<Members> result;
  for (const optim::OptimizerParamGroup& group : optimizer.param_groups()) {
    Members& members = result.emplace_back();
    for (const at::Tensor& param : group.params()) {
      const auto place = places.find(param.unsafeGetTensorImpl());
      if (place == places.end()) continue;
      members.indices.push_back(place->second);
      members.params.push_back(param);
    }
  }
  return result;
}

template <typename State>
State& state_of(optim::Optimizer& optimizer, const at::Tensor& param) {
  std::unique_ptr<optim::OptimizerParamState>& state =
      optimizer.state()[param.unsafeGetTensorImpl()];
  if (state == nullptr) state = std::make_unique<State>();
  return static_cast<State&>(*state);
}

/// A moment, in float32 where the parameter is narrower: in fp16 the squares of gradients are 0.
at::Tensor& moment(at::Tensor& tensor, const at::Tensor& param) {
  const bool narrow = MasterWeights::has_master(param);
  if (!tensor.defined()) {
    tensor =
        at::zeros_like(param, param.options().dtype(narrow ? at::kFloat : param.scalar_type()));
  } else if (narrow && tensor.scalar_type() != at::kFloat) {
    tensor = tensor.to(at::kFloat);
  }
  return tensor;
}

std::vector<at::Tensor> masters_of(AccumulatorCore& core, const Members& members) {
  for (const at::Tensor& param : members.params) {
    if (MasterWeights::has_master(param)) return core.masters().current(members.indices);
  }
  return {};
}

template <typename Options, typename State>
void step_adam(optim::Optimizer& optimizer, AccumulatorCore& core, const StepScale& scale,
               const optim::OptimizerParamGroup& group, const Members& members) {
  const auto& options = static_cast<const Options&>(group.options());
  std::vector<at::Tensor> exp_avgs;
  std::vector<at::Tensor> exp_avg_sqs;
  std::vector<at::Tensor> max_exp_avg_sqs;
  std::vector<at::Tensor> steps;
  for (const at::Tensor& param : members.params) {
    auto& state = state_of<State>(optimizer, param);
    exp_avgs.push_back(moment(state.exp_avg(), param));
    exp_avg_sqs.push_back(moment(state.exp_avg_sq(), param));
    if (options.amsgrad()) max_exp_avg_sqs.push_back(moment(state.max_exp_avg_sq(), param));
    steps.push_back(at::full({}, static_cast<double>(state.step()),
                             param.options().dtype(at::kDouble).requires_grad(false)));
  }
  constexpr bool kDecoupled = std::is_same_v<Options, optim::AdamWOptions>;
  call_operator<AdamwStep<double>>(
      members.params, core.sums(members.indices), exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
      masters_of(core, members), steps, options.lr(), std::get<0>(options.betas()),
      std::get<1>(options.betas()), options.eps(), options.weight_decay(), kDecoupled,
      options.amsgrad(), /*maximize=*/false, OptionalTensor(scale.coefficient), OptionalTensor(),
      /*reset=*/false);
  for (const at::Tensor& param : members.params) {
    auto& state = state_of<State>(optimizer, param);
    state.step(state.step() + 1);
  }
}

void step_sgd(optim::Optimizer& optimizer, AccumulatorCore& core, const StepScale& scale,
              const optim::OptimizerParamGroup& group, const Members& members) {
  const auto& options = static_cast<const optim::SGDOptions&>(group.options());
  std::vector<at::Tensor> buffers;
  c10::List<bool> first_step;
  if (options.momentum() != 0.0) {
    for (const at::Tensor& param : members.params) {
      at::Tensor& buffer = state_of<optim::SGDParamState>(optimizer, param).momentum_buffer();
      first_step.push_back(!buffer.defined());
      buffers.push_back(moment(buffer, param));
    }
  }
  call_operator<SgdStep<double>>(members.params, core.sums(members.indices), buffers,
                                 masters_of(core, members), options.lr(), options.momentum(),
                                 options.dampening(), options.weight_decay(), options.nesterov(),
                                 /*maximize=*/false, first_step, OptionalTensor(scale.coefficient),
                                 OptionalTensor(), /*reset=*/false);
}

/// members: by group.
void step_through_grad(optim::Optimizer& optimizer, AccumulatorCore& core, const StepScale& scale,
                       const std::vector<Members>& members, bool with_masters) {
  std::vector<std::size_t> indices;
  for (const Members& group : members) {
    indices.insert(indices.end(), group.indices.begin(), group.indices.end());
  }
  std::vector<at::Tensor> set_aside;
  for (std::size_t i = 0; i < core.size(); ++i) {
    at::Tensor& grad = core.param(i).mutable_grad();
    set_aside.push_back(std::move(grad));
    grad = at::Tensor();
  }
  const auto put_back = [&] {
    core.masters().take_back();
    for (std::size_t i = 0; i < core.size(); ++i) core.param(i).mutable_grad() = set_aside[i];
  };
  try {
    if (with_masters) core.masters().lend(indices);
    const std::vector<at::Tensor> sums = core.scale_sums(indices, scale.coefficient);
    for (std::size_t k = 0; k < indices.size(); ++k) {
      const at::Tensor& param = core.param(indices[k]);
      param.mutable_grad() = sums[k].to(param.scalar_type());
    }
    optimizer.step();
  } catch (...) {
    put_back();
    throw;
  }
  put_back();
}

void step_one(optim::Optimizer& optimizer, AccumulatorCore& core, const StepScale& scale,
              bool shared) {
  const bool is_adamw = typeid(optimizer) == typeid(optim::AdamW);
  const bool is_adam = typeid(optimizer) == typeid(optim::Adam);
  const bool is_sgd = typeid(optimizer) == typeid(optim::SGD);
  const std::vector<Members> members = members_of(optimizer, core);
  if (shared || (!is_adamw && !is_adam && !is_sgd)) {
    return step_through_grad(optimizer, core, scale, members, /*with_masters=*/!shared);
  }
  for (std::size_t i = 0; i < members.size(); ++i) {
    const optim::OptimizerParamGroup& group = optimizer.param_groups()[i];
    if (members[i].indices.empty()) continue;
    if (is_adamw) {
      step_adam<optim::AdamWOptions, optim::AdamWParamState>(optimizer, core, scale, group,
                                                             members[i]);
    } else if (is_adam) {
      step_adam<optim::AdamOptions, optim::AdamParamState>(optimizer, core, scale, group,
                                                           members[i]);
    } else {
      step_sgd(optimizer, core, scale, group, members[i]);
    }
  }
}

}  // namespace

void check_optimizers(const std::vector<optim::Optimizer*>& optimizers,
                      const AccumulatorCore& core) {
  std::unordered_set<const c10::TensorImpl*> held;
  for (const optim::Optimizer* const optimizer : optimizers) {
    TORCH_CHECK(optimizer != nullptr, kAccumulator, "optimizers takes optimizers, got none");
    TORCH_CHECK(typeid(*optimizer) != typeid(optim::LBFGS), kAccumulator,
                "optimizer takes one that steps without a closure, got LBFGS");
    for (const optim::OptimizerParamGroup& group : optimizer->param_groups()) {
      for (const at::Tensor& param : group.params()) {
        TORCH_CHECK(held.insert(param.unsafeGetTensorImpl()).second, kAccumulator,
                    "optimizers takes optimizers that share no parameters, got two that hold one "
                    "of sizes ",
                    param.sizes());
      }
    }
  }
  std::size_t found = 0;
  for (std::size_t i = 0; i < core.size(); ++i) {
    const bool holds = held.count(core.param(i).unsafeGetTensorImpl()) != 0;
    TORCH_CHECK(holds || !core.param(i).requires_grad(), kAccumulator,
                "optimizer takes one that holds the model's parameters, got one without parameter ",
                core.name(i));
    found += holds ? 1 : 0;
  }
  TORCH_CHECK(found == held.size(), kAccumulator,
              "optimizer takes one that holds the model's parameters only, got ",
              held.size() - found, " others");
}

void step_optimizers(const std::vector<optim::Optimizer*>& optimizers, AccumulatorCore& core,
                     const StepScale& scale) {
  const at::NoGradGuard no_grad;
  // LibTorch's optimizers count their steps on the host, so the host has to know.
  if (core.written().empty() || scale.found_inf.item<float>() != 0.0f) return;
  // Parameters that lie over one another are to be updated in turn.
  const bool shared = shares_memory(core.params());
  for (optim::Optimizer* const optimizer : optimizers) step_one(*optimizer, core, scale, shared);
}

}  // namespace torch_ext
