// launch_attention_program() for .cu files.
#pragma once

#include "attention_kernels.h"
#include "cuda_block.cuh"
#include "kernel_launch.h"

namespace torch_ext::cuda {

template <typename Program>
cudaError_t launch_attention_program(const typename Program::Args& args, std::int64_t blocks,
                                     cudaStream_t stream) {
  return launch_program<Program, CudaBlock>(args, blocks, stream);
}

}  // namespace torch_ext::cuda

#define TORCH_EXT_LAUNCH(...)                                                                   \
  template cudaError_t launch_attention_program<__VA_ARGS__>(const typename __VA_ARGS__::Args&, \
                                                             std::int64_t, cudaStream_t)
