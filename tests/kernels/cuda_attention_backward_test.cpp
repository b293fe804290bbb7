// The CUDA backward kernels, run on the host and on a GPU, against the reference.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "cuda_attention_kernels.h"
#include "cuda_case_list.h"

namespace torch_ext::testing {
namespace {

class CudaAttentionBackward : public CudaAttentionTest {
 protected:
  void check_each_dtype(CaseList (*cases)(ScalarType), std::size_t step) const {
    for (const ScalarType dtype : kAllDtypes) {
      check_cases(*GetParam().standard, every(step, cases(dtype)), /*forward_only=*/false);
    }
  }
};

CaseList tensor_core_cases() {
  return aligned_cases({ScalarType::kBFloat16, ScalarType::kFloat16}, {64, 128, 256, 40});
}

TEST_P(CudaAttentionBackward, TensorCoreTiles) {
  check_cases(*GetParam().standard, every(1, tensor_core_cases()), /*forward_only=*/false);
}
TEST_P(CudaAttentionBackward, DeterministicTensorCoreTiles) {
  check_cases(*GetParam().deterministic, every(2, tensor_core_cases()),
              /*forward_only=*/false);
}
TEST_P(CudaAttentionBackward, TileEdges) { check_each_dtype(tile_edge_cases, 19); }
TEST_P(CudaAttentionBackward, HeadDims) { check_each_dtype(head_dim_cases, 5); }
TEST_P(CudaAttentionBackward, ZeroSizes) { check_each_dtype(zero_sized_cases, 7); }
TEST_P(CudaAttentionBackward, Layouts) { check_each_dtype(layout_cases, 5); }
TEST_P(CudaAttentionBackward, BatchesAndGroups) { check_each_dtype(batch_and_group_cases, 7); }
TEST_P(CudaAttentionBackward, UnroundedGradients) {
  check_each_dtype(unrounded_gradient_cases, 3);
  check_cases(*GetParam().deterministic, every(3, unrounded_gradient_cases(ScalarType::kBFloat16)),
              /*forward_only=*/false);
}
TEST_P(CudaAttentionBackward, Causal) { check_each_dtype(causal_cases, 11); }
TEST_P(CudaAttentionBackward, BooleanMasks) { check_each_dtype(boolean_mask_cases, 7); }
TEST_P(CudaAttentionBackward, AdditiveMasks) { check_each_dtype(additive_mask_cases, 7); }
TEST_P(CudaAttentionBackward, KeyPadding) { check_each_dtype(key_padding_cases, 3); }
TEST_P(CudaAttentionBackward, Scales) { check_each_dtype(scale_cases, 2); }
TEST_P(CudaAttentionBackward, Dropout) { check_each_dtype(dropout_cases, 4); }
TEST_P(CudaAttentionBackward, Random) {
  check_cases(*GetParam().standard, every(12, random_cases(2026, 600)), /*forward_only=*/false);
  check_cases(*GetParam().deterministic, every(17, random_cases(2027, 600)),
              /*forward_only=*/false);
}

TORCH_EXT_TEST_EACH_CUDA_ATTENTION(CudaAttentionBackward);

}  // namespace
}  // namespace torch_ext::testing
