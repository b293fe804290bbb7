// How the kernels walk the tensors of one list entry together.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <vector>

#include "../../kernels/accumulation_params.h"

namespace torch_ext {

/// Owns what the StridedLoops of one call point to.
class LoopArena {
 public:
  /// Tensors of one shape, the first of them written or the only one; null: absent. Nothing but
  /// {dims = 0} where all lie in one piece in the same order.
  StridedLoop loop_of(std::initializer_list<const at::Tensor*> operands);

 private:
  StridedLoop strided_loop(std::initializer_list<const at::Tensor*> operands);
  std::deque<std::vector<std::int64_t>> numbers_;
};

}  // namespace torch_ext
