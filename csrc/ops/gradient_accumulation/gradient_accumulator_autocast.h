// The weights' autocast copies, made once an autocast region, as stock makes them. They are not
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

  /// `weight` in another dtype, without history. What was written into the weight is in it from the
  /// next autocast region on, through `.data` too, which no version counter tells. To compare a
  /// copy with its weight instead takes as long as to cast again (0.7 ms for 768 x 3072 in bf16).
  at::Tensor copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype);

  /// The weights are about to change.
  void clear();

 private:
  struct Entry {
    at::Tensor copy;
    std::uint32_t version = 0;  // the weight's
  };
  bool is_new_region(const at::Device& device, at::ScalarType dtype);
  void forget_copies();

  std::mutex mutex_;
  std::vector<Entry> entries_;
  at::Tensor probe_;       // one element, which torch's cache holds a copy of
  at::Tensor probe_copy_;  // that copy, in the newest region
};

}  // namespace torch_ext
