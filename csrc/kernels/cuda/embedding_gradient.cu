// SASS EmbeddingSumProgram<float>: LDG.E.128|LDG.E.EF.128
// SASS EmbeddingCheckProgram: stack-allowed (arguments of the printf that ends a wrong call) LDG
#include <cstdio>

#include "accumulation_kernels.h"
#include "embedding_gradient_launch.h"
#include "kernel_launch.h"

namespace torch_ext::cuda {
namespace {

class EmbeddingBlock {
 public:
  TORCH_EXT_DEVICE std::int64_t index() const { return blockIdx.x; }
  TORCH_EXT_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }

  TORCH_EXT_DEVICE void refuse_row(std::int64_t row, std::int64_t num_embeddings) {
    printf("torch_ext::embedding_wgrad_: indices takes rows of weight_grad, 0 to %lld, got %lld\n",
           static_cast<long long>(num_embeddings - 1), static_cast<long long>(row));
    __trap();
  }
};

}  // namespace

std::size_t embedding_gradient_workspace(const SortedEmbeddingGradient& params) {
  return embedding_workspace(params);
}

cudaError_t embedding_gradient(const SortedEmbeddingGradient& params, void* workspace,
                               cudaStream_t stream) {
  return launch_embedding_gradient(StreamLauncher<EmbeddingBlock>{stream}, params, workspace);
}

}  // namespace torch_ext::cuda
