// What the Autograd kernels of attention_forward and attention_backward save between the passes.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>

#include "attention_arguments.h"

namespace torch_ext {

/// The arguments that are no tensors, and which optional tensors were given.
struct AttentionOptions {
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = std::nullopt;
  bool enable_gqa = false;
  c10::SymInt causal_offset = 0;
  bool contiguous = false;

  void save(torch::autograd::AutogradContext& context) const;
  static AttentionOptions load(const torch::autograd::AutogradContext& context);
};

/// A mask that is no variable, as the backward pass will want it whatever its owner does with it
/// meanwhile: a copy, which may come from a tensor of inference mode or be followed by a refill in
/// place. Repeated dimensions (strides of 0) are kept once. Undefined where `mask` is null.
at::Tensor mask_copy(const at::Tensor* mask);

/// A list of tensors of which some may be absent. Saved variables must all be defined to survive
/// compiled autograd, so absent ones are left out and `present` tells which.
class SparseTensorList {
 public:
  void push(const at::Tensor& tensor) { push(&tensor); }
  void push(const at::Tensor* tensor);

  const torch::autograd::variable_list& tensors() const { return tensors_; }
  std::int64_t present() const { return present_; }

  /// The full list again; undefined where absent.
  static torch::autograd::variable_list expand(const torch::autograd::variable_list& tensors,
                                               std::int64_t present);

 private:
  torch::autograd::variable_list tensors_;
  std::int64_t present_ = 0;  // bit i: position i
  int size_ = 0;
};

/// A saved variable as an argument: none where it is undefined.
inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace torch_ext
