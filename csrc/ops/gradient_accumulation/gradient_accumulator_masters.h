// The float32 twins of bf16 and fp16 parameters, which the optimizers update: a parameter is its
// twin, rounded. Without them, updates smaller than half a unit in a parameter's last place vanish.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace torch_ext {

class MasterWeights {
 public:
  explicit MasterWeights(std::vector<at::Tensor> params);

  static bool has_master(const at::Tensor& param);

  /// For an optimizer operator: the masters of these parameters, an empty tensor for a parameter
  /// that needs none. The operator compares them with the parameters: where somebody else has
  /// written those since (a loaded checkpoint, a clamp, an averaged model), the masters follow.
  std::vector<at::Tensor> current(const std::vector<std::size_t>& indices);

  /// Until take_back() these parameters are their masters, in float32: for an optimizer that is not
  /// ours. Hooks, groups and states see the same tensors as ever.
  void lend(const std::vector<std::size_t>& indices);
  /// The parameters are what they were, of the values that the masters have now.
  void take_back();

  /// A master that the caller keeps, undefined where there is none yet: it is copied before it is
  /// next written, if it is still held then.
  at::Tensor share(std::size_t index);
  /// A copy that restore() takes, of a master of any dtype and device.
  at::Tensor copy_of(std::size_t index, const at::Tensor& master) const;
  /// Undefined: the parameter as it is will be the master.
  void restore(std::size_t index, at::Tensor master);

 private:
  struct Entry {
    at::Tensor param;
    at::Tensor master{};
    at::Tensor lent{};  // the parameter's own memory, while the parameter is its master
    bool shared = false;
  };
  std::vector<Entry> entries_;
};

}  // namespace torch_ext
