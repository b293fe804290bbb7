// The weights' autocast copies, kept for a window where stock makes them once an autocast region.
// They are not torch's own cache, whose copies must carry autograd's history.
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

  /// `weight` in another dtype, without history. The first call in an autocast region finds
  /// whatever has been written into the weight, through `.data` too, as stock does.
  at::Tensor copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype);

  /// The weights are about to change.
  void clear();

 private:
  struct Entry {
    at::Tensor copy;
    std::uint32_t version = 0;  // the weight's
    std::uint64_t region = 0;   // where the copy was last compared with the weight
  };
  std::uint64_t current_region(const at::Device& device, at::ScalarType dtype);

  std::mutex mutex_;
  std::vector<Entry> entries_;
  at::Tensor probe_;       // one element, which torch's cache holds a copy of
  at::Tensor probe_copy_;  // that copy, in the newest region
  std::uint64_t region_ = 0;
};

}  // namespace torch_ext
