// The mini-batch kernels on the GPU. Entries, and what their loops point to, are read on the host
// before a launcher returns; everything else in the params is device memory. Nothing waits for the
// device, so that all of it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../accumulation_params.h"
#include "embedding_gradient_launch.h"

namespace torch_ext::cuda {

cudaError_t accumulate(const AccumulateParams& params, cudaStream_t stream);

/// Bytes of device memory that a call needs, aligned to 16.
std::size_t grad_stats_workspace(const GradStatsParams& params);
cudaError_t grad_stats(const GradStatsParams& params, void* workspace, cudaStream_t stream);

std::size_t adam_step_workspace(const AdamParams& params);
cudaError_t adam_step(const AdamParams& params, void* workspace, cudaStream_t stream);
cudaError_t sgd_step(const SgdParams& params, cudaStream_t stream);

std::size_t embedding_gradient_workspace(const SortedEmbeddingGradient& params);

/// A row outside [0, num_embeddings) is printed and ends the kernel with an error before the weight
/// is touched.
cudaError_t embedding_gradient(const SortedEmbeddingGradient& params, void* workspace,
                               cudaStream_t stream);

}  // namespace torch_ext::cuda
