// Scores of any size on CUDA, and rows of nothing but huge finite masks: the backward pass weighs
// keys as the forward pass did. attention_large_scores_test.cpp has the same for the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "cuda_attention_kernels.h"
#include "kernels/reference/attention_reference.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

class CudaAttentionLargeScores : public CudaAttentionTest {
 protected:
  static void run(const KernelTable& kernel, const AttentionProblem& problem) {
    run_forward(kernel, problem, SerialTaskRunner());
    run_backward(kernel, problem, SerialTaskRunner());
  }
};

/// Tiles without options and with them, decoding, keys in splits.
CaseList shapes_of(ScalarType dtype, double magnitude) {
  CaseList cases;
  for (const auto& [q_len, kv_len] : {std::pair{70, 70}, {3, 150}, {2, 600}, {40, 130}}) {
    AttentionCase spec{
        .dtype = dtype, .q_len = q_len, .kv_len = kv_len, .head_dim = 24, .magnitude = magnitude};
    cases.push_back(spec);
    spec.query_heads = 4;
    spec.is_causal = true;
    spec.causal_offset = kv_len - q_len;
    cases.push_back(spec);
    spec.mask = {.kind = AttentionMaskKind::kAdditive, .pattern = MaskPattern::kBlocks};
    spec.scale = -0.3;
    cases.push_back(spec);
  }
  return numbered(cases);
}

/// Squares of errors against float64, added up over several problems.
struct ErrorSum {
  double kernel = 0.0;
  double formula = 0.0;  // of the formula written out in the type that kernels accumulate in
  double size = 0.0;     // of the results

  void add(const StridedTensor& actual, const StridedTensor& written_out,
           const StridedTensor& exact) {
    const std::vector<double> a = actual.values();
    const std::vector<double> b = written_out.values();
    const std::vector<double> e = exact.values();
    for (std::size_t i = 0; i < e.size(); ++i) {
      kernel += (a[i] - e[i]) * (a[i] - e[i]);
      formula += (b[i] - e[i]) * (b[i] - e[i]);
      size += e[i] * e[i];
    }
  }
};

TEST_P(CudaAttentionLargeScores, ErrorsAreAtMostThreeTimesThoseOfTheFormula) {
  for (const auto& [dtype, eps] :
       {std::pair{ScalarType::kFloat32, 0x1p-23}, {ScalarType::kBFloat16, 0x1p-8}}) {
    for (const double magnitude : {3.0, 10.0, 30.0, 100.0, 1000.0, 1e5}) {
      ErrorSum out, grad_query, grad_key, grad_value;
      for (std::int64_t seed = 1; seed <= 4; ++seed) {
        const AttentionProblem problem({.dtype = dtype,
                                        .q_len = 64,
                                        .kv_len = 64,
                                        .head_dim = 64,
                                        .seed = seed,
                                        .magnitude = magnitude});
        const AttentionProblem exact = problem.as_float64();
        const AttentionProblem formula = problem.with_new_outputs();
        run(*GetParam().standard, problem);
        attention_forward_written_out(formula.forward_params(), DotOrder::kFirstToLast);
        attention_backward_written_out(formula.backward_params(), DotOrder::kFirstToLast);
        attention_forward_reference(exact.forward_params());
        attention_backward_reference(exact.backward_params());
        out.add(problem.out, formula.out, exact.out);
        grad_query.add(problem.grad_query, formula.grad_query, exact.grad_query);
        grad_key.add(problem.grad_key, formula.grad_key, exact.grad_key);
        grad_value.add(problem.grad_value, formula.grad_value, exact.grad_value);
      }
      for (const auto& [name, errors] : {std::pair{"out", out},
                                         {"grad_query", grad_query},
                                         {"grad_key", grad_key},
                                         {"grad_value", grad_value}}) {
        EXPECT_LE(std::sqrt(errors.kernel),
                  3.0 * std::sqrt(errors.formula) + 4.0 * eps * std::sqrt(errors.size))
            << name << (dtype == ScalarType::kFloat32 ? " fp32" : " bf16") << " magnitude "
            << magnitude << ", the formula's: " << std::sqrt(errors.formula);
      }
    }
  }
}

TEST_P(CudaAttentionLargeScores, EveryKindOfTile) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const double magnitude : {10.0, 300.0, 1e4}) {
      if (dtype == ScalarType::kFloat16 && magnitude > 1e3) continue;
      check_cases(*GetParam().standard, thinned(shapes_of(dtype, magnitude)),
                  /*forward_only=*/false);
    }
  }
  check_cases(*GetParam().deterministic, thinned(shapes_of(ScalarType::kBFloat16, 300.0)),
              /*forward_only=*/false);
}

TEST_P(CudaAttentionLargeScores, WeightsOfARowAddUpToOne) {
  // grad_out is 1: a key's grad_value is the sum of its weights.
  for (const ScalarType dtype : kAllDtypes) {
    for (const double magnitude : {1.0, 10.0, 100.0, 1000.0}) {
      for (const std::int64_t q_len : {1, 3, 50}) {
        AttentionProblem problem({.dtype = dtype,
                                  .q_len = q_len,
                                  .kv_len = 200,
                                  .head_dim = 40,
                                  .magnitude = magnitude});
        problem.grad_out.fill([](auto, auto, auto, auto) { return 1.0; });
        run(*GetParam().standard, problem);
        double sum = 0.0;
        for (std::int64_t key = 0; key < 200; ++key) {
          const double weight = problem.grad_value.get(0, 1, key, 39);
          // No weight exceeds 1; their sum is rounded to the dtype once.
          ASSERT_GE(weight, 0.0);
          ASSERT_LE(weight, static_cast<double>(q_len) * (1.0 + 0x1p-8));
          sum += weight;
        }
        // The size of the scores rounds them; weights are rounded to 16 bits before the product.
        const double rounding = dtype == ScalarType::kFloat64 ? 1e-16 : 6e-8;
        const double size = 40.0 * magnitude * magnitude * problem.scale;
        const double bound =
            rounding * std::max(size, 20.0) +
            (dtype == ScalarType::kBFloat16 || dtype == ScalarType::kFloat16 ? 0x1p-8 : 0.0);
        ASSERT_NEAR(sum / static_cast<double>(q_len), 1.0, bound) << describe(problem.spec);
      }
    }
  }
}

/// -1e9 and its like leave no room for a score in a float, so weights are equal, as they are for
/// the lowest value in double, too.
TEST_P(CudaAttentionLargeScores, RowsOfHugeFiniteMasksAreAverages) {
  for (const auto& [dtype, excluded] : {std::pair{ScalarType::kFloat32, -3.4028234663852886e38},
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
      run(*GetParam().standard, problem);
      spec.mask.excluded = dtype == ScalarType::kFloat64 ? -1.7976931348623157e308 : -3.3895e38;
      const AttentionProblem lowest(spec);
      check_attention(*GetParam().standard, lowest);
      // Equal masks of equal scores: not a bit of the gradients differs.
      EXPECT_EQ(problem.out.bytes(), lowest.out.bytes());
      EXPECT_EQ(problem.grad_query.bytes(), lowest.grad_query.bytes());
      EXPECT_EQ(problem.grad_key.bytes(), lowest.grad_key.bytes());
      EXPECT_EQ(problem.grad_value.bytes(), lowest.grad_value.bytes());
      EXPECT_EQ(problem.grad_mask.bytes(), lowest.grad_mask.bytes());
    }
  }
}

TEST_P(CudaAttentionLargeScores, LogsumexpJoinedWithThatOfOtherKeysIsKept) {
  // As in attention over several devices: weights relative to all keys, not to these alone.
  for (const ScalarType dtype : {ScalarType::kFloat32, ScalarType::kBFloat16}) {
    AttentionProblem problem(
        {.dtype = dtype, .q_len = 40, .kv_len = 60, .head_dim = 16, .magnitude = 60.0});
    run(*GetParam().standard, problem);
    const std::vector<double> alone = problem.grad_value.values();
    problem.logsumexp.fill(
        [&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col) {
          return problem.logsumexp.get(batch, head, row, col) + 8.0;
        });
    run_backward(*GetParam().standard, problem, SerialTaskRunner());
    const std::vector<double> joined = problem.grad_value.values();
    const double rounding = dtype == ScalarType::kFloat32 ? 1e-3 : 0x1p-6;
    for (std::size_t i = 0; i < alone.size(); ++i) {
      ASSERT_NEAR(joined[i], alone[i] * std::exp(-8.0),
                  rounding * std::exp(-8.0) * (std::fabs(alone[i]) + 1.0));
    }
  }
}

TORCH_EXT_TEST_EACH_CUDA_ATTENTION(CudaAttentionLargeScores);

}  // namespace
}  // namespace torch_ext::testing
