// Whether fp32 may be rounded to TF32 on CUDA devices.
#pragma once

#include <ATen/Context.h>

namespace torch_ext {

/// As torch's own products ask: torch.backends.cuda.matmul.allow_tf32,
/// torch.backends.cuda.matmul.fp32_precision, torch.set_float32_matmul_precision.
inline bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

}  // namespace torch_ext
