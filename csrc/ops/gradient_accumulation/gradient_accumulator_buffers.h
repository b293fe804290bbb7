// The sums of one accumulation window, one for each parameter. Nothing is ever zeroed: the first
// gradient of a window is written over whatever a sum held, or taken as it is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

namespace torch_ext {

/// Whether nobody else holds the tensor or its memory.
inline bool is_only_owner(const at::Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
}

class AccumulationBuffers {
 public:
  AccumulationBuffers(const std::vector<at::Tensor>& params, at::ScalarType dtype);

  /// Where a gradient is to be added: sum = beta * sum + gradient, beta being 0 the first time.
  struct Destination {
    at::Tensor sum;
    double beta;
  };
  Destination claim(std::size_t index);

  /// Adds gradients, each of its parameter's sizes. They are consumed: one that nobody else holds
  /// may become the sum itself.
  void add(const std::vector<std::size_t>& indices, std::vector<at::Tensor> grads);

  /// Starts a part that undo() can take back.
  void begin();
  /// Whether what begin() found is still there, untouched.
  bool can_undo() const;
  /// can_undo(); what came since is forgotten.
  [[nodiscard]] bool undo();

  /// Sums of parameters whose dtype or device has changed in the middle of a window go along.
  void follow_params();

  /// Forgets all sums; memory that the next window will write again is kept.
  void reset();

  bool is_written(std::size_t index) const { return slots_[index].written; }
  const at::Tensor& sum(std::size_t index) const { return slots_[index].sum; }
  std::vector<std::size_t> written() const;
  std::vector<at::Tensor> sums(const std::vector<std::size_t>& indices) const;
  /// The sums themselves: their parameters have none afterwards.
  std::vector<at::Tensor> take(const std::vector<std::size_t>& indices);

  /// A sum that the caller keeps: it is copied before it is next written, if it is still held then.
  at::Tensor share(std::size_t index);
  /// A copy that restore() takes, of a sum of any dtype and device.
  at::Tensor copy_of(std::size_t index, const at::Tensor& sum) const;
  void restore(std::size_t index, at::Tensor sum);

 private:
  struct Slot {
    at::Tensor param;  // for its sizes, strides and device
    at::Tensor sum{};
    bool written = false;
    bool written_before = false;  // when begin() was called
    bool added_to = false;        // since begin(), though written before
    bool adopted = false;         // the sum was a gradient: the next window will bring its own
    bool shared = false;
  };

  static bool is_held_elsewhere(Slot& slot);
  /// Of the slot's sum, as its parameter is now: never narrower than float64 gradients.
  at::ScalarType dtype_of(const Slot& slot) const;
  bool fits(const Slot& slot) const;
  void allocate(Slot& slot) const;
  void convert(Slot& slot) const;

  at::ScalarType dtype_;
  std::vector<Slot> slots_;
};

}  // namespace torch_ext
