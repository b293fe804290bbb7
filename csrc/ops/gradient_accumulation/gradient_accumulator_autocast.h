// The weights' autocast copies, made once a window instead of once a micro-batch. They are not
// torch's own cache, whose copies must carry autograd's history.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace torch_ext {

class AutocastCopies {
 public:
  explicit AutocastCopies(std::size_t count) : entries_(count) {}

  /// `weight` in another dtype, without history.
  at::Tensor copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype);

  /// The weights are about to change.
  void clear();

 private:
  struct Entry {
    at::Tensor copy;
    std::uint32_t version = 0;  // the weight's
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace torch_ext
