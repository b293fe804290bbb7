// The forward kernels of every instruction set against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class AttentionForward : public AttentionKernelTest {
 protected:
  void check_each_dtype(CaseList (*cases)(ScalarType)) {
    for (const ScalarType dtype : kAllDtypes) {
      check_cases(kernel(), thinned(cases(dtype)), /*forward_only=*/true);
    }
  }

  AttentionProblem run(const AttentionCase& spec) const {
    AttentionProblem problem(spec);
    run_forward(kernel(), problem, SerialTaskRunner());
    return problem;
  }
};

TEST_P(AttentionForward, TileEdges) { check_each_dtype(tile_edge_cases); }
TEST_P(AttentionForward, HeadDims) { check_each_dtype(head_dim_cases); }
TEST_P(AttentionForward, ZeroSizes) { check_each_dtype(zero_sized_cases); }
TEST_P(AttentionForward, Layouts) { check_each_dtype(layout_cases); }
TEST_P(AttentionForward, BatchesAndGroups) { check_each_dtype(batch_and_group_cases); }
TEST_P(AttentionForward, Causal) { check_each_dtype(causal_cases); }
TEST_P(AttentionForward, BooleanMasks) { check_each_dtype(boolean_mask_cases); }
TEST_P(AttentionForward, AdditiveMasks) { check_each_dtype(additive_mask_cases); }
TEST_P(AttentionForward, KeyPadding) { check_each_dtype(key_padding_cases); }
TEST_P(AttentionForward, Scales) { check_each_dtype(scale_cases); }
TEST_P(AttentionForward, Dropout) { check_each_dtype(dropout_cases); }
TEST_P(AttentionForward, Splits) { check_each_dtype(split_cases); }

TEST_P(AttentionForward, ScoresOfTenThousands) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {2, 40}) {
      AttentionCase spec{
          .dtype = dtype, .q_len = q_len, .kv_len = 150, .head_dim = 24, .magnitude = 55.0};
      check_cases(kernel(), {spec}, true);
      spec.is_causal = true;
      spec.causal_offset = 100;
      check_cases(kernel(), {spec}, true);
    }
  }
}

TEST_P(AttentionForward, GrowingScoresAreRescaled) {
  // Each block of keys exceeds the ones before by far more than the conditional rescaling allows.
  for (const std::int64_t q_len : {1, 30}) {
    for (const double step : {0.05, 3.0, -3.0}) {
      AttentionProblem problem(
          {.q_len = q_len, .kv_len = 400, .head_dim = 4, .scale = 1.0, .forward_only = true});
      problem.query.fill([](auto, auto, auto, auto) { return 0.5; });
      problem.key.fill(
          [&](auto, auto, std::int64_t row, auto) { return step * static_cast<double>(row) / 2; });
      check_attention(kernel(), problem);
    }
  }
}

TEST_P(AttentionForward, WithoutLogsumexp) {
  for (const std::int64_t q_len : {1, 20}) {
    for (const std::int64_t kv_len : {50, 2000}) {
      check_cases(kernel(), {{.q_len = q_len, .kv_len = kv_len, .wants_logsumexp = false}}, true);
    }
  }
}

TEST_P(AttentionForward, RowsWithoutKeysAreZero) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {4, 70}) {
      for (const AttentionMaskKind kind :
           {AttentionMaskKind::kBoolean, AttentionMaskKind::kAdditive}) {
        const AttentionProblem problem =
            run({.dtype = dtype,
                 .query_heads = 1,
                 .kv_heads = 1,
                 .q_len = q_len,
                 .kv_len = 100,
                 .mask = {.kind = kind, .pattern = MaskPattern::kHalfRows}});
        for (std::int64_t row = 1; row < q_len; row += 2) {
          for (std::int64_t d = 0; d < 16; ++d) ASSERT_EQ(problem.out.get(0, 0, row, d), 0.0);
          ASSERT_EQ(problem.logsumexp.get(0, 0, row, 0), -kInfinity);
        }
      }
    }
  }
}

TEST_P(AttentionForward, LowestFiniteMaskIsNoExclusion) {
  // A row of nothing but the lowest value of its dtype, as transformers makes for left padding, is
  // uniform attention; in the log2 domain it must not overflow to -inf.
  for (const auto& [dtype, lowest] : {std::pair{ScalarType::kFloat32, -3.4028234663852886e38},
                                      {ScalarType::kBFloat16, -3.3895313892515355e38},
                                      {ScalarType::kFloat16, -65504.0},
                                      {ScalarType::kFloat64, -1.7976931348623157e308}}) {
    for (const std::int64_t q_len : {2, 50}) {
      AttentionProblem problem({.dtype = dtype,
                                .q_len = q_len,
                                .kv_len = 80,
                                .mask = {.kind = AttentionMaskKind::kAdditive,
                                         .pattern = MaskPattern::kHalfRows,
                                         .dtype = dtype,
                                         .excluded = lowest}});
      SCOPED_TRACE(describe(problem.spec));
      run_forward(kernel(), problem, SerialTaskRunner());
      for (std::int64_t d = 0; d < 16; ++d) {
        double mean = 0.0;
        for (std::int64_t key = 0; key < 80; ++key) mean += problem.value.get(0, 1, key, d) / 80;
        // With 65504 added the scores' fractions are rounded to 2^-8 and better.
        ASSERT_NEAR(problem.out.get(0, 1, 1, d), mean, dtype == ScalarType::kFloat16 ? 0.8 : 0.01);
      }
      EXPECT_LT(problem.logsumexp.get(0, 1, 1, 0), -6e4);
      EXPECT_GT(problem.logsumexp.get(0, 1, 1, 0), -kInfinity);
      EXPECT_GT(problem.logsumexp.get(0, 1, 0, 0), -50.0);
    }
  }
}

/// Where `out` and `logsumexp` of head 0 are NaN: (q_len) flags.
std::vector<bool> rows_with_nan(const AttentionProblem& problem) {
  std::vector<bool> rows;
  for (std::int64_t row = 0; row < problem.shape.q_len; ++row) {
    bool any = false;
    for (std::int64_t d = 0; d < problem.shape.value_dim; ++d) {
      any |= std::isnan(problem.out.get(0, 0, row, d));
    }
    EXPECT_EQ(std::isnan(problem.logsumexp.get(0, 0, row, 0)), any) << row;
    rows.push_back(any);
  }
  return rows;
}

class AttentionForwardNonFinite : public AttentionForward {};

TEST_P(AttentionForwardNonFinite, QueryPoisonsItsRow) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {3, 40}) {
      for (const double bad : {kNan, kInfinity}) {
        AttentionProblem problem({.dtype = dtype, .q_len = q_len, .kv_len = 70});
        problem.query.set(0, 0, 2, 5, bad);
        run_forward(kernel(), problem, SerialTaskRunner());
        std::vector<bool> expected(static_cast<std::size_t>(q_len));
        expected[2] = true;
        EXPECT_EQ(rows_with_nan(problem), expected) << describe(problem.spec) << " " << bad;
      }
    }
  }
}

TEST_P(AttentionForwardNonFinite, KeyPoisonsTheRowsThatAttendToIt) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {3, 40}) {
      for (const std::int64_t bad_key : {1, 2, 33, 69}) {
        AttentionProblem problem(
            {.dtype = dtype, .q_len = q_len, .kv_len = 70, .is_causal = true, .causal_offset = 32});
        problem.key.set(0, 0, bad_key, 5, kNan);
        run_forward(kernel(), problem, SerialTaskRunner());
        std::vector<bool> expected;
        for (std::int64_t row = 0; row < q_len; ++row) expected.push_back(bad_key <= row + 32);
        EXPECT_EQ(rows_with_nan(problem), expected) << describe(problem.spec) << " " << bad_key;
      }
    }
  }
}

TEST_P(AttentionForwardNonFinite, MaskedKeysDoNotMatter) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {3, 40}) {
      for (const double bad : {kNan, kInfinity}) {
        for (const int how : {0, 1, 2}) {
          AttentionCase spec{.dtype = dtype, .q_len = q_len, .kv_len = 200, .forward_only = true};
          if (how == 0) spec.key_padding = 0.5;
          if (how == 1) spec.mask.kind = AttentionMaskKind::kBoolean;
          if (how == 2) spec.mask.kind = AttentionMaskKind::kAdditive;
          spec.mask.broadcast.rows = spec.mask.broadcast.heads = true;
          AttentionProblem problem(spec);
          for (std::int64_t key = 0; key < 200; ++key) {
            if (!problem.attends(0, 0, 0, key)) problem.key.set(0, 0, key, key % 16, bad);
          }
          check_attention(kernel(), problem);
        }
      }
    }
  }
}

TEST_P(AttentionForwardNonFinite, ValueReachesItsColumn) {
  for (const ScalarType dtype : kAllDtypes) {
    for (const std::int64_t q_len : {3, 40}) {
      for (const double bad : {kNan, kInfinity, -kInfinity}) {
        AttentionProblem problem(
            {.dtype = dtype, .q_len = q_len, .kv_len = 70, .forward_only = true});
        problem.value.set(0, 0, 69, 3, bad);
        check_attention(kernel(), problem);
      }
    }
  }
}

TEST_P(AttentionForwardNonFinite, PayloadsOfNanStayNan) {
  // All ones, as uninitialised memory often is, and the smallest payload.
  for (const std::uint32_t bits : {0xFFFFFFFFu, 0x7F800001u, 0x7FC00155u}) {
    for (const std::int64_t q_len : {1, 40}) {
      AttentionProblem problem({.q_len = q_len, .kv_len = 70});
      float nan;
      static_assert(sizeof nan == sizeof bits);
      std::memcpy(&nan, &bits, sizeof nan);
      char* key = static_cast<char*>(problem.key.view().data);
      std::memcpy(key + (33 * 16 + 5) * 4, &nan, sizeof nan);  // head 0, key 33
      run_forward(kernel(), problem, SerialTaskRunner());
      EXPECT_EQ(rows_with_nan(problem), std::vector<bool>(static_cast<std::size_t>(q_len), true))
          << std::hex << bits;
    }
  }
}

TEST_P(AttentionForwardNonFinite, MaskOfNanAndInfinity) {
  for (const double bad : {kNan, kInfinity}) {
    for (const std::int64_t q_len : {3, 40}) {
      AttentionProblem problem(
          {.q_len = q_len, .kv_len = 70, .mask = {.kind = AttentionMaskKind::kAdditive}});
      problem.mask.set(0, 0, 1, 68, bad);
      run_forward(kernel(), problem, SerialTaskRunner());
      std::vector<bool> expected(static_cast<std::size_t>(q_len));
      expected[1] = true;
      EXPECT_EQ(rows_with_nan(problem), expected) << bad;
    }
  }
}

TORCH_EXT_TEST_EACH_ISA(AttentionForward);
TORCH_EXT_TEST_EACH_ISA(AttentionForwardNonFinite);

}  // namespace
}  // namespace torch_ext::testing
