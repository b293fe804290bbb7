// Scores of any size, and rows of nothing but huge finite masks: the backward pass weighs keys as
// the forward pass did, and a row's weights add up to 1.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

class AttentionLargeScores : public AttentionKernelTest {
 protected:
  void run(const AttentionProblem& problem) const {
    run_forward(kernel(), problem, SerialTaskRunner());
    run_backward(kernel(), problem, SerialTaskRunner());
  }
};

/// Tiles, decoding, grouped heads, split keys; head dims whose scale is no power of 2.
CaseList shapes_of(ScalarType dtype, double magnitude) {
  const AttentionCase base{.dtype = dtype, .head_dim = 24, .magnitude = magnitude};
  CaseList cases;
  for (const auto& [q_len, kv_len] :
       {std::pair{40, 150}, {3, 150}, {1, 700}, {20, 1100}, {70, 70}}) {
    AttentionCase spec = base;
    spec.q_len = q_len;
    spec.kv_len = kv_len;
    cases.push_back(spec);
    spec.query_heads = 6;
    spec.is_causal = true;
    spec.causal_offset = kv_len - q_len;
    cases.push_back(spec);
    spec.mask = {.kind = AttentionMaskKind::kAdditive, .pattern = MaskPattern::kBlocks};
    spec.scale = -0.3;
    cases.push_back(spec);
    spec.mask.kind = AttentionMaskKind::kBoolean;
    spec.dropout = 0.2;
    cases.push_back(spec);
  }
  return numbered(cases);
}

TEST_P(AttentionLargeScores, ErrorsAreThoseOfTheFormulaWrittenOut) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const double magnitude : {10.0, 55.0, 300.0, 2000.0, 1e5}) {
      if (dtype == ScalarType::kFloat16 && magnitude > 1e4) continue;
      check_cases(kernel(), thinned(shapes_of(dtype, magnitude)), /*forward_only=*/false);
    }
  }
}

TEST_P(AttentionLargeScores, ScalesOfAnySize) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const double scale : {1e3, -1e6, 1e12, 1e30, 1e-12, -1e-30, 1e-40}) {
      CaseList cases;
      for (const std::int64_t q_len : {2, 40}) {
        cases.push_back({.dtype = dtype, .q_len = q_len, .kv_len = 90, .scale = scale});
      }
      check_cases(kernel(), thinned(numbered(cases)), /*forward_only=*/false);
    }
  }
}

TEST_P(AttentionLargeScores, WeightsOfARowAddUpToOne) {
  // grad_out is 1: a key's grad_value is the sum of its weights.
  for (const ScalarType dtype : kAllDtypes) {
    for (const double magnitude : {1.0, 10.0, 100.0, 1000.0, 1e4}) {
      for (const std::int64_t q_len : {1, 3, 50}) {
        AttentionProblem problem({.dtype = dtype,
                                  .q_len = q_len,
                                  .kv_len = 300,
                                  .head_dim = 40,
                                  .magnitude = magnitude});
        problem.grad_out.fill([](auto, auto, auto, auto) { return 1.0; });
        run(problem);
        for (std::int64_t d : {0, 39}) {
          double sum = 0.0;
          for (std::int64_t key = 0; key < 300; ++key) {
            const double weight = problem.grad_value.get(0, 1, key, d);
            // Rounded to the dtype once.
            ASSERT_GE(weight, 0.0);
            ASSERT_LE(weight, static_cast<double>(q_len) * (1.0 + 0x1p-8));
            sum += weight;
          }
          // A float's logsumexp of up to 1024 is rounded by 3e-5; larger ones are not used.
          const double bound = dtype == ScalarType::kFloat64   ? 1e-12
                               : dtype == ScalarType::kFloat32 ? 4e-5
                                                               : 0x1p-8;
          ASSERT_NEAR(sum / static_cast<double>(q_len), 1.0, bound)
              << describe(problem.spec) << " column " << d;
        }
      }
    }
  }
}

/// -1e9 and its like leave no room for a score in a float, so weights are equal, as they are for
/// the lowest value in double, too.
TEST_P(AttentionLargeScores, RowsOfHugeFiniteMasksAreAverages) {
  for (const auto& [dtype, excluded] : {std::pair{ScalarType::kFloat32, -3.4028234663852886e38},
                                        {ScalarType::kFloat32, -1e30},
                                        {ScalarType::kFloat32, -1e15},
                                        {ScalarType::kFloat32, -1e9},
                                        {ScalarType::kFloat64, -1.7976931348623157e308},
                                        {ScalarType::kFloat64, -1e18},
                                        {ScalarType::kBFloat16, -3.3895313892515355e38},
                                        {ScalarType::kBFloat16, -1e9},
                                        {ScalarType::kFloat16, -1e9}}) {
    for (const std::int64_t q_len : {2, 50}) {
      AttentionCase spec{
          .dtype = dtype,
          .query_heads = 4,
          .q_len = q_len,
          .kv_len = 80,
          .mask = {.kind = AttentionMaskKind::kAdditive,
                   .pattern = MaskPattern::kHalfRows,
                   .dtype = dtype == ScalarType::kFloat16 ? ScalarType::kFloat32 : dtype,
                   .excluded = excluded},
          .wants_grad_mask = true};
      const AttentionProblem problem(spec);
      SCOPED_TRACE(describe(spec));
      run(problem);
      spec.mask.excluded = dtype == ScalarType::kFloat64 ? -1.7976931348623157e308 : -3.3895e38;
      AttentionProblem lowest(spec);
      check_attention(kernel(), lowest);
      // Equal masks of equal scores: not a bit of the gradients differs.
      EXPECT_EQ(problem.out.bytes(), lowest.out.bytes());
      EXPECT_EQ(problem.grad_query.bytes(), lowest.grad_query.bytes());
      EXPECT_EQ(problem.grad_key.bytes(), lowest.grad_key.bytes());
      EXPECT_EQ(problem.grad_value.bytes(), lowest.grad_value.bytes());
      EXPECT_EQ(problem.grad_mask.bytes(), lowest.grad_mask.bytes());
    }
  }
}

TEST_P(AttentionLargeScores, LogsumexpJoinedWithThatOfOtherKeysIsKept) {
  // As in attention over several devices: weights relative to all keys, not to these alone.
  AttentionProblem problem({.q_len = 40, .kv_len = 60, .head_dim = 16, .magnitude = 60.0});
  run(problem);
  const std::vector<double> alone = problem.grad_value.values();
  problem.logsumexp.fill(
      [&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col) {
        return problem.logsumexp.get(batch, head, row, col) + 8.0;
      });
  run_backward(kernel(), problem, SerialTaskRunner());
  const std::vector<double> joined = problem.grad_value.values();
  for (std::size_t i = 0; i < alone.size(); ++i) {
    ASSERT_NEAR(joined[i], alone[i] * std::exp(-8.0), 1e-3 * std::fabs(alone[i]) + 1e-7);
  }
}

TORCH_EXT_TEST_EACH_ISA(AttentionLargeScores);

}  // namespace
}  // namespace torch_ext::testing
