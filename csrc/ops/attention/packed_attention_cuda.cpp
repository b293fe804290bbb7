// torch_ext::packed_attention_forward and packed_attention_backward on CUDA devices.
#include <torch/library.h>

#include "attention_cuda.h"
#include "attention_signature.h"

namespace torch_ext {

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("packed_attention_forward", TORCH_FN(packed_attention_forward_kernel<CudaAttention>));
  m.impl("packed_attention_backward", TORCH_FN(packed_attention_backward_kernel<CudaAttention>));
}

}  // namespace torch_ext
