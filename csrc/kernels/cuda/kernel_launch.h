// A program (device_program.h) as a CUDA kernel, and its launch. For .cu files alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device_program.h"

namespace torch_ext::cuda {

/// The name of the program is part of the kernel's: scripts/check_cuda_binary.py finds it by that.
template <typename Program, typename Block>
__global__ void __launch_bounds__(Program::kThreads, Program::kBlocksPerUnit)
    program_kernel(const __grid_constant__ typename Program::Args args) {
  Block block;
  Program::run(block, args);
}

/// Enqueues `blocks` blocks; none: nothing. A grid is limited to 2^31 - 1 of them.
template <typename Program, typename Block>
cudaError_t launch_program(const typename Program::Args& args, std::int64_t blocks,
                           cudaStream_t stream) {
  static_assert(sizeof(args) <= 32764, "kernel parameters end there");
  if (blocks <= 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = program_kernel<Program, Block>;
  if constexpr (Program::kSharedBytes > 48 * 1024) {  // what a kernel gets without asking
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Program::kSharedBytes);
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(blocks), Program::kThreads, Program::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

/// Programs on a stream, as list_launch.h asks for them.
template <typename Block>
struct StreamLauncher {
  using Status = cudaError_t;
  static constexpr Status kSuccess = cudaSuccess;
  static constexpr Status kTooLarge = cudaErrorInvalidConfiguration;

  cudaStream_t stream;

  template <typename Program>
  Status launch(const typename Program::Args& args, std::int64_t blocks) const {
    return launch_program<Program, Block>(args, blocks, stream);
  }
};

}  // namespace torch_ext::cuda
