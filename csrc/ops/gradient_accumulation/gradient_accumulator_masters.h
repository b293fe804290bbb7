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
  /// that needs none. A parameter that somebody else has written since (a loaded checkpoint, an
  /// averaged model) takes its master along, but for elements that are the master's rounding still.
  std::vector<at::Tensor> current(const std::vector<std::size_t>& indices);

  /// The operator has written these parameters from their masters.
  void mark_stepped(const std::vector<std::size_t>& indices);

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
    std::uint32_t version = 0;  // the parameter's, when it was last the master's rounding
    bool shared = false;
  };
  std::vector<Entry> entries_;
};

}  // namespace torch_ext
