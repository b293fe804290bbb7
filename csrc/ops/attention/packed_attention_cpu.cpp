// torch_ext::packed_attention_forward and packed_attention_backward on the CPU.
#include <torch/library.h>

#include "attention_cpu.h"
#include "attention_signature.h"

namespace torch_ext {

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("packed_attention_forward", TORCH_FN(packed_attention_forward_kernel<CpuAttention>));
  m.impl("packed_attention_backward", TORCH_FN(packed_attention_backward_kernel<CpuAttention>));
}

}  // namespace torch_ext
