// torch_ext::packed_attention_forward and packed_attention_backward on CUDA devices.
#include <torch/library.h>

#include "attention_cuda.h"
#include "packed_attention_kernels.h"

namespace torch_ext {
namespace {

using Kernels = PackedAttentionKernels<run_attention_forward_cuda, run_attention_backward_cuda>;

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("packed_attention_forward", TORCH_FN(Kernels::forward));
  m.impl("packed_attention_backward", TORCH_FN(Kernels::backward));
}

}  // namespace torch_ext
