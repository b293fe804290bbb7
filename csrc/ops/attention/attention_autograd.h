// What the Autograd kernels of the attention operators save between the passes, and the way to them
// past the dispatcher.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "attention_arguments.h"

namespace torch_ext {

/// attention_forward() and packed_attention_forward() of checked arguments on plain CPU tensors
/// (plain_dispatch.h) of which one requires grad: for composites, which have checked them.
ForwardResult record_attention_forward(const AttentionArguments& arguments,
                                       const AttentionGeometry<std::int64_t>& checked);
ForwardResult record_packed_attention_forward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGeometry<std::int64_t>& checked);

/// The saved list of both forward operators begins with these two.
constexpr std::size_t kSavedOut = 0;
constexpr std::size_t kSavedLogsumexp = 1;

/// The options that are no tensors, by their names.
void save_options(torch::autograd::AutogradContext& context, const AttentionArguments& arguments);
AttentionArguments load_options(const torch::autograd::AutogradContext& context);

/// A mask that is no variable, as the backward pass will want it whatever its owner does with it
/// meanwhile: a copy, which may come from a tensor of inference mode or be followed by a refill in
/// place. Repeated dimensions (strides of 0) are kept once.
at::Tensor mask_copy(const at::Tensor& mask);

/// The call's tensors as the backward pass keeps them: masks that are no variables as copies, an
/// additive one too unless `keeps_mask`.
AttentionTensors saved_tensors(const AttentionArguments& arguments, bool keeps_mask);

/// A list of tensors of which some may be absent. Saved variables must all be defined to survive
/// compiled autograd, so absent ones are left out and `present` tells which.
class SparseTensorList {
 public:
  void push(const at::Tensor& tensor) { push(&tensor); }
  void push(const at::Tensor* tensor);

  const torch::autograd::variable_list& tensors() const { return tensors_; }
  std::int64_t present() const { return present_; }

  /// The full list of `size` again; undefined where absent.
  static torch::autograd::variable_list expand(const torch::autograd::variable_list& tensors,
                                               std::int64_t present, std::size_t size);

 private:
  torch::autograd::variable_list tensors_;
  std::int64_t present_ = 0;  // bit i: position i
  int size_ = 0;
};

/// The results of the backward pass in a list.
template <typename Result>
torch::autograd::variable_list gradient_list(Result&& gradients) {
  return std::apply(
      [](auto&&... gradient) { return torch::autograd::variable_list{std::move(gradient)...}; },
      std::forward<Result>(gradients));
}

}  // namespace torch_ext
