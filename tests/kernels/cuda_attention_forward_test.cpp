// The CUDA forward kernels, run on the host and on a GPU, against the reference.
#include <gtest/gtest.h>

#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "cuda_attention_kernels.h"
#include "cuda_case_list.h"

namespace torch_ext::testing {
namespace {

class CudaAttentionForward : public CudaAttentionTest {
 protected:
  void check_each_dtype(CaseList (*cases)(ScalarType), std::size_t step) const {
    for (const ScalarType dtype : kAllDtypes) {
      check_cases(*GetParam().standard, every(step, cases(dtype)), /*forward_only=*/true);
    }
  }
};

TEST_P(CudaAttentionForward, TileEdges) { check_each_dtype(tile_edge_cases, 7); }
TEST_P(CudaAttentionForward, HeadDims) { check_each_dtype(head_dim_cases, 3); }
TEST_P(CudaAttentionForward, ZeroSizes) { check_each_dtype(zero_sized_cases, 5); }
TEST_P(CudaAttentionForward, Layouts) { check_each_dtype(layout_cases, 3); }
TEST_P(CudaAttentionForward, BatchesAndGroups) { check_each_dtype(batch_and_group_cases, 5); }
TEST_P(CudaAttentionForward, Causal) { check_each_dtype(causal_cases, 7); }
TEST_P(CudaAttentionForward, BooleanMasks) { check_each_dtype(boolean_mask_cases, 5); }
TEST_P(CudaAttentionForward, AdditiveMasks) { check_each_dtype(additive_mask_cases, 7); }
TEST_P(CudaAttentionForward, KeyPadding) { check_each_dtype(key_padding_cases, 3); }
TEST_P(CudaAttentionForward, Scales) { check_each_dtype(scale_cases, 1); }
TEST_P(CudaAttentionForward, Dropout) { check_each_dtype(dropout_cases, 3); }
TEST_P(CudaAttentionForward, Splits) { check_each_dtype(split_cases, 4); }

/// Aligned rows and no mask: the kernels without options, and those of each width with them.
TEST_P(CudaAttentionForward, TensorCoreTiles) {
  CaseList cases;
  for (const ScalarType dtype : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (const std::int64_t head_dim : {64, 128, 256, 40}) {
      for (const auto& [q_len, kv_len] : {std::pair{64, 64}, {130, 200}, {257, 129}}) {
        AttentionCase spec{.dtype = dtype,
                           .query_heads = 2,
                           .kv_heads = 1,
                           .q_len = q_len,
                           .kv_len = kv_len,
                           .head_dim = head_dim};
        if (head_dim == 40) spec.value_dim = 72;
        cases.push_back(spec);
        spec.is_causal = true;
        spec.causal_offset = kv_len - q_len;
        cases.push_back(spec);
        spec.dropout = 0.3;
        spec.mask = {.kind = AttentionMaskKind::kNone};
        if (q_len == 130) cases.push_back(spec);
      }
    }
  }
  check_cases(*GetParam().standard, every(1, numbered(cases)), /*forward_only=*/true);
}

TORCH_EXT_TEST_EACH_CUDA_ATTENTION(CudaAttentionForward);

}  // namespace
}  // namespace torch_ext::testing
