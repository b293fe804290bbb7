#include "gradient_accumulator_take.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>

#include "gradient_accumulator_core.h"

namespace torch_ext {
namespace {

// Elements. Smaller ones wait for the end of the micro-batch: one call for all of them.
constexpr std::int64_t kLarge = 1 << 16;

struct TakeHook final : torch::autograd::FunctionPostHook {
  TakeHook(AccumulatorCore& core, std::size_t index) : core(core), index(index) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& outputs,
      const torch::autograd::variable_list& /*inputs*/) override {
    // Those who look at .grad when this parameter's is complete may look at it later too.
    auto& node = *core.taker().node(index);
    if (!has_tensor_hooks(node) && (core.ignores_node_hooks() || !has_foreign_hooks(node))) {
      core.take_grad(index);
    }
    return outputs;
  }

  // Compiled autograd leaves the gradient in .grad, where the end of the micro-batch finds it.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& /*args*/) const override {}

  AccumulatorCore& core;
  std::size_t index;
};

}  // namespace

void GradientTaker::attach() {
  hooks_.resize(core_.size());
  for (std::size_t i = 0; i < core_.size(); ++i) {
    const at::Tensor& param = core_.param(i);
    if (param.numel() < kLarge || !param.requires_grad()) continue;
    // Another one where the parameter's dtype or device has changed.
    NodePtr node = torch::autograd::impl::grad_accumulator(param);
    if (hooks_[i].node == node) continue;
    detach(hooks_[i]);
    hooks_[i].key = node->add_post_hook(std::make_unique<TakeHook>(core_, i));
    hooks_[i].node = std::move(node);
  }
}

void GradientTaker::detach(Hook& hook) {
  if (hook.node != nullptr) hook.node->del_post_hook(hook.key);
  hook.node = nullptr;
}

GradientTaker::~GradientTaker() {
  for (Hook& hook : hooks_) detach(hook);
}

bool has_tensor_hooks(torch::autograd::Node& node) {
  return !node.tensor_pre_hooks().empty() || node.tensor_post_acc_grad_hooks() != nullptr;
}

bool has_foreign_hooks(torch::autograd::Node& node) {
  if (!node.pre_hooks().empty()) return true;
  const auto& hooks = node.post_hooks();
  return std::any_of(hooks.begin(), hooks.end(), [](const auto& hook) {
    return dynamic_cast<const TakeHook*>(hook.get()) == nullptr;
  });
}

}  // namespace torch_ext
