// Whether tensors lie over one another: then they are to be written in turn.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_ext {

/// Whether any of them overlaps another one, or itself.
bool shares_memory(at::TensorList tensors);

}  // namespace torch_ext
