// Takes large gradients out of .grad while backward is still running, as soon as each is complete:
// no two layers' gradients are in memory at once, and a gradient is added while the caches hold it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <vector>

namespace torch_ext {

class AccumulatorCore;

class GradientTaker {
 public:
  explicit GradientTaker(AccumulatorCore& core) : core_(core) {}
  ~GradientTaker();
  GradientTaker(const GradientTaker&) = delete;
  GradientTaker& operator=(const GradientTaker&) = delete;

  /// Hooks the accumulation nodes of the parameters that are large and require a gradient.
  void attach();

  using NodePtr = decltype(torch::autograd::impl::grad_accumulator(at::Tensor()));
  const NodePtr& node(std::size_t index) const { return hooks_[index].node; }

 private:
  struct Hook {
    NodePtr node;
    std::uintptr_t key = 0;
  };

  static void detach(Hook& hook);

  AccumulatorCore& core_;
  std::vector<Hook> hooks_;  // one for each parameter; without a node where there is none
};

/// Whether anybody has hooks on the parameter of an accumulation node: on its gradient, or on the
/// gradient's arrival in .grad.
bool has_tensor_hooks(torch::autograd::Node& node);

/// Whether anybody but takers has hooks on an accumulation node itself.
bool has_foreign_hooks(torch::autograd::Node& node);

}  // namespace torch_ext
