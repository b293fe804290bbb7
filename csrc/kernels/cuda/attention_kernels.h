// Attention on a GPU, for csrc/ops. Everything is enqueued on the stream; nothing waits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_attention_schedule.h"
#include "dropout_mask.cuh"

namespace torch_ext::cuda {

/// A program (device_program.h) of this folder on a stream. Defined in attention_programs.cuh; each
/// .cu file instantiates its own.
template <typename Program>
cudaError_t launch_attention_program(const typename Program::Args& args, std::int64_t blocks,
                                     cudaStream_t stream);

/// What became of a call: where it went, a static string, or the first error.
struct AttentionLaunch {
  const char* path = "cuda.empty";
  cudaError_t status = cudaSuccess;
};

/// `workspace` has schedule.total_bytes, aligned to 256. Schedules of CudaPath::kEmpty are the
/// caller's.
AttentionLaunch attention_forward(const CudaForwardSchedule& schedule, void* workspace,
                                  cudaStream_t stream);
AttentionLaunch attention_backward(const CudaBackwardSchedule& schedule, void* workspace,
                                   cudaStream_t stream);

cudaError_t attention_dropout_mask(const DropoutMaskArgs& args, cudaStream_t stream);

}  // namespace torch_ext::cuda
