// The gradient noise scale of McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
// appendix A.1: from the squared norms of the gradient of a small and of a large batch.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext {

class GradientNoise {
 public:
  /// One window. All of one element, float64, on one device: nothing is read back from it.
  ///   small, large              squared norms of the normalised gradients of ...
  ///   small_batch, large_batch  ... the window's first micro-batch and the whole window, in weight
  ///   found_inf                 not 0: the window does not count
  void update(const at::Tensor& small, const at::Tensor& small_batch, const at::Tensor& large,
              const at::Tensor& large_batch, const at::Tensor& found_inf);

  /// The estimate in units of weight, NaN before the first window of two micro-batches.
  at::Tensor scale() const;

  /// (2,): the running means that scale() is the ratio of. Undefined before the first window.
  const at::Tensor& state() const { return means_; }
  void restore(at::Tensor state) { means_ = std::move(state); }

 private:
  at::Tensor means_;
};

}  // namespace torch_ext
