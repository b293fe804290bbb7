// Scratch memory that a kernel asks for when its plan is made. csrc/ops brings torch's allocator.
#pragma once

#include <cstddef>

namespace torch_ext {

class Workspace {
 public:
  virtual ~Workspace() = default;
  /// `bytes` of 64-byte aligned memory, there until the kernel has returned. Asked for once a call.
  virtual void* allocate(std::size_t bytes) const = 0;
};

}  // namespace torch_ext
