// What the list programs ask of the hardware.
#pragma once

#include <cstdint>

#include "kernel_launch.h"

namespace torch_ext::cuda {

class ListBlock {
 public:
  TORCH_EXT_DEVICE std::int64_t index() const { return blockIdx.x; }
  TORCH_EXT_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  TORCH_EXT_DEVICE void sync() { __syncthreads(); }

  template <typename T>
  TORCH_EXT_DEVICE T& shared() {
    __shared__ T value;
    return value;
  }
};

}  // namespace torch_ext::cuda
