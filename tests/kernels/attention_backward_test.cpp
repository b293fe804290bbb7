// The backward kernels of every instruction set against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

class AttentionBackward : public AttentionKernelTest {
 protected:
  void check_each_dtype(CaseList (*cases)(ScalarType)) const {
    for (const ScalarType dtype : kAllDtypes) {
      check_cases(kernel(), thinned(cases(dtype)), /*forward_only=*/false);
    }
  }

  void run(const AttentionProblem& problem) const {
    run_forward(kernel(), problem, SerialTaskRunner());
    run_backward(kernel(), problem, SerialTaskRunner());
  }
};

TEST_P(AttentionBackward, TileEdges) { check_each_dtype(tile_edge_cases); }
TEST_P(AttentionBackward, HeadDims) { check_each_dtype(head_dim_cases); }
TEST_P(AttentionBackward, ZeroSizes) { check_each_dtype(zero_sized_cases); }
TEST_P(AttentionBackward, Layouts) { check_each_dtype(layout_cases); }
TEST_P(AttentionBackward, BatchesAndGroups) { check_each_dtype(batch_and_group_cases); }
TEST_P(AttentionBackward, UnroundedGradients) { check_each_dtype(unrounded_gradient_cases); }
TEST_P(AttentionBackward, Causal) { check_each_dtype(causal_cases); }
TEST_P(AttentionBackward, BooleanMasks) { check_each_dtype(boolean_mask_cases); }
TEST_P(AttentionBackward, AdditiveMasks) { check_each_dtype(additive_mask_cases); }
TEST_P(AttentionBackward, KeyPadding) { check_each_dtype(key_padding_cases); }
TEST_P(AttentionBackward, Scales) { check_each_dtype(scale_cases); }
TEST_P(AttentionBackward, Dropout) { check_each_dtype(dropout_cases); }
TEST_P(AttentionBackward, Chunks) { check_each_dtype(split_cases); }

TEST_P(AttentionBackward, MaskGradientOfEveryBroadcastOverSomeBatchDimensions) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    for (int bits = 0; bits < 64; ++bits) {
      AttentionCase spec{.dtype = dtype,
                         .batch_sizes = {2, 1, 3, 2},
                         .query_heads = 4,
                         .kv_heads = 2,
                         .q_len = 3,
                         .kv_len = 5,
                         .head_dim = 4,
                         .mask = {.kind = AttentionMaskKind::kAdditive},
                         .seed = bits + 1,
                         .wants_grad_mask = true};
      spec.mask.broadcast = {
          .heads = (bits & 8) != 0,
          .rows = (bits & 16) != 0,
          .cols = (bits & 32) != 0,
          .batch_dims = {(bits & 1) != 0, false, (bits & 2) != 0, (bits & 4) != 0}};
      cases.push_back(spec);
    }
    check_cases(kernel(), thinned(cases), false);
  }
}

TEST_P(AttentionBackward, ManyChunksOfManyQueries) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    for (const bool causal : {false, true}) {
      for (const std::int64_t kv_len : {511, 512, 770}) {
        AttentionCase spec{.dtype = dtype,
                           .query_heads = 1,
                           .kv_heads = 1,
                           .q_len = 300,
                           .kv_len = kv_len,
                           .head_dim = 24,
                           .is_causal = causal,
                           .causal_offset = kv_len - 300};
        cases.push_back(spec);
        spec.query_heads = 2;
        spec.causal_offset = -40;
        spec.mask = {.kind = AttentionMaskKind::kAdditive, .pattern = MaskPattern::kBlocks};
        spec.mask.broadcast.cols = causal;
        spec.wants_grad_mask = true;
        spec.dropout = 0.2;
        cases.push_back(spec);
      }
    }
    check_cases(kernel(), thinned(cases), false);
  }
}

TEST_P(AttentionBackward, RowsWithoutKeysHaveNoGradient) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const AttentionMaskKind kind :
         {AttentionMaskKind::kBoolean, AttentionMaskKind::kAdditive}) {
      const AttentionProblem problem({.dtype = dtype,
                                      .q_len = 70,
                                      .kv_len = 100,
                                      .mask = {.kind = kind, .pattern = MaskPattern::kHalfRows},
                                      .has_grad_logsumexp = true,
                                      .wants_grad_mask = kind == AttentionMaskKind::kAdditive});
      run(problem);
      for (std::int64_t row = 1; row < 70; row += 2) {
        for (std::int64_t d = 0; d < 16; ++d) ASSERT_EQ(problem.grad_query.get(0, 1, row, d), 0.0);
        for (std::int64_t key = 0; problem.grad_mask && key < 100; ++key) {
          ASSERT_EQ(problem.grad_mask.get(0, 1, row, key), 0.0);
        }
      }
    }
  }
}

TEST_P(AttentionBackward, NothingAttendedGivesZeros) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const int how : {0, 1, 2, 3}) {
      AttentionCase spec{.dtype = dtype, .q_len = 40, .kv_len = 600, .has_grad_logsumexp = true};
      if (how == 0) spec.mask = {.kind = AttentionMaskKind::kBoolean};
      if (how == 1) spec.mask = {.kind = AttentionMaskKind::kAdditive};
      spec.mask.pattern = MaskPattern::kEmpty;
      if (how == 1) spec.wants_grad_mask = true;
      if (how == 2) spec.key_padding = 1.0;
      if (how == 3) spec.is_causal = true;
      if (how == 3) spec.causal_offset = -40;
      const AttentionProblem problem(spec);
      run(problem);
      std::vector<const StridedTensor*> gradients{&problem.grad_query, &problem.grad_key,
                                                  &problem.grad_value};
      if (problem.grad_mask) gradients.push_back(&problem.grad_mask);
      for (const StridedTensor* gradient : gradients) {
        for (const double value : gradient->values()) ASSERT_EQ(value, 0.0) << describe(spec);
      }
    }
  }
}

TEST_P(AttentionBackward, MaskGradientOfNoBatchesIsZero) {
  for (const ScalarType dtype : kAllDtypes) {
    AttentionCase spec{.dtype = dtype,
                       .batch_sizes = {2, 0, 1, 1},
                       .q_len = 5,
                       .kv_len = 9,
                       .mask = {.kind = AttentionMaskKind::kAdditive},
                       .wants_grad_mask = true};
    spec.mask.broadcast.batch_dims[1] = true;
    AttentionProblem problem(spec);
    run_backward(kernel(), problem, SerialTaskRunner());
    const std::vector<std::uint8_t> bytes = problem.grad_mask.bytes();
    EXPECT_EQ(bytes.size(), 2u * 2 * 5 * 9 * (dtype == ScalarType::kFloat64 ? 8 : 4));
    EXPECT_EQ(bytes, std::vector<std::uint8_t>(bytes.size()));
  }
}

TEST_P(AttentionBackward, UnwantedGradientsAreLeftAlone) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t kv_len : {40, 600}) {
      const AttentionCase spec{.dtype = dtype,
                               .query_heads = 4,
                               .q_len = 33,
                               .kv_len = kv_len,
                               .mask = {.kind = AttentionMaskKind::kAdditive},
                               .dropout = 0.1,
                               .wants_grad_mask = true};
      const AttentionProblem all(spec);
      run(all);
      for (int wanted = 0; wanted < 16; ++wanted) {
        AttentionProblem some(spec);
        if ((wanted & 1) == 0) some.grad_query = {};
        if ((wanted & 2) == 0) some.grad_key = {};
        if ((wanted & 4) == 0) some.grad_value = {};
        if ((wanted & 8) == 0) some.grad_mask = {};
        run(some);
        if (some.grad_query) {
          EXPECT_EQ(some.grad_query.bytes(), all.grad_query.bytes()) << wanted;
        }
        if (some.grad_key) {
          EXPECT_EQ(some.grad_key.bytes(), all.grad_key.bytes()) << wanted;
        }
        if (some.grad_value) {
          EXPECT_EQ(some.grad_value.bytes(), all.grad_value.bytes()) << wanted;
        }
        // Sums are grouped by whether the mask's gradient is wanted: equal, but not bitwise.
        if (some.grad_mask) {
          EXPECT_EQ(some.grad_mask.bytes(), all.grad_mask.bytes()) << wanted;
        }
      }
    }
  }
}

TEST_P(AttentionBackward, NanReachesNoOtherHeadOrBatch) {
  for (const ScalarType dtype : kAllDtypes) {
    AttentionCase spec{.dtype = dtype,
                       .batch_sizes = {2, 1, 1, 1},
                       .query_heads = 4,
                       .q_len = 35,
                       .kv_len = 70,
                       .mask = {.kind = AttentionMaskKind::kBoolean, .density = 0.5}};
    const AttentionProblem clean(spec);
    run(clean);
    AttentionProblem problem(spec);
    problem.grad_out.set(1, 2, 20, 3, std::numeric_limits<double>::quiet_NaN());
    run(problem);
    for (std::int64_t batch = 0; batch < 2; ++batch) {
      for (std::int64_t head = 0; head < 4; ++head) {
        for (std::int64_t row = 0; row < 35; ++row) {
          const bool poisoned = batch == 1 && head == 2 && row == 20;
          for (std::int64_t d = 0; d < 16; ++d) {
            const double value = problem.grad_query.get(batch, head, row, d);
            if (poisoned) {
              ASSERT_TRUE(std::isnan(value));
            } else {
              ASSERT_EQ(value, clean.grad_query.get(batch, head, row, d));
            }
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST_EACH_ISA(AttentionBackward);

}  // namespace
}  // namespace torch_ext::testing
