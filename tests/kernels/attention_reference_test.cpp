// The oracle itself: against numbers worked out by hand, and its gradients against finite
// differences of its forward pass.
#include "kernels/reference/attention_reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attention_case.h"
#include "attention_check.h"
#include "kernels/counter_rng.h"

namespace torch_ext::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One query, two keys with scores 0 and ln 3, so weights 1/4 and 3/4; values 4 and 8.
AttentionProblem two_keys(AttentionCase spec = {}) {
  spec.dtype = ScalarType::kFloat64;
  spec.query_heads = spec.kv_heads = 1;
  spec.q_len = 1;
  spec.kv_len = 2;
  spec.head_dim = 1;
  spec.scale = 0.5;
  AttentionProblem problem(spec);
  problem.query.set(0, 0, 0, 0, 2.0);
  problem.key.set(0, 0, 0, 0, 0.0);
  problem.key.set(0, 0, 1, 0, std::log(3.0));
  problem.value.set(0, 0, 0, 0, 4.0);
  problem.value.set(0, 0, 1, 0, 8.0);
  problem.grad_out.set(0, 0, 0, 0, 1.0);
  return problem;
}

TEST(AttentionReference, TwoKeysForward) {
  const AttentionProblem problem = two_keys();
  attention_forward_reference(problem.forward_params());
  EXPECT_DOUBLE_EQ(problem.out.get(0, 0, 0, 0), 7.0);
  EXPECT_DOUBLE_EQ(problem.logsumexp.get(0, 0, 0, 0), std::log(4.0));
}

TEST(AttentionReference, TwoKeysBackward) {
  const AttentionProblem problem = two_keys();
  attention_backward_reference(problem.backward_params());
  // dP = (4, 8), delta = 7, dS = (1/4 * -3, 3/4 * 1).
  EXPECT_DOUBLE_EQ(problem.grad_query.get(0, 0, 0, 0), 0.5 * 0.75 * std::log(3.0));
  EXPECT_DOUBLE_EQ(problem.grad_key.get(0, 0, 0, 0), -0.75);
  EXPECT_DOUBLE_EQ(problem.grad_key.get(0, 0, 1, 0), 0.75);
  EXPECT_DOUBLE_EQ(problem.grad_value.get(0, 0, 0, 0), 0.25);
  EXPECT_DOUBLE_EQ(problem.grad_value.get(0, 0, 1, 0), 0.75);
}

TEST(AttentionReference, GradientOfLogsumexpIsTheWeights) {
  AttentionProblem problem = two_keys({.has_grad_logsumexp = true});
  problem.grad_out.set(0, 0, 0, 0, 0.0);
  problem.grad_logsumexp.set(0, 0, 0, 0, 10.0);
  attention_backward_reference(problem.backward_params());
  EXPECT_DOUBLE_EQ(problem.grad_query.get(0, 0, 0, 0), 0.5 * 7.5 * std::log(3.0));
  EXPECT_DOUBLE_EQ(problem.grad_key.get(0, 0, 0, 0), 2.5);
  EXPECT_DOUBLE_EQ(problem.grad_key.get(0, 0, 1, 0), 7.5);
  EXPECT_DOUBLE_EQ(problem.grad_value.get(0, 0, 1, 0), 0.0);
}

TEST(AttentionReference, CausalOffsetDecidesWhatARowSees) {
  for (const auto& [offset, out] : {std::pair{-1, 0.0}, {0, 4.0}, {1, 7.0}, {100, 7.0}}) {
    const AttentionProblem problem = two_keys({.is_causal = true, .causal_offset = offset});
    attention_forward_reference(problem.forward_params());
    EXPECT_DOUBLE_EQ(problem.out.get(0, 0, 0, 0), out) << offset;
    if (offset < 0) {
      EXPECT_EQ(problem.logsumexp.get(0, 0, 0, 0), -kInfinity);
    }
  }
}

TEST(AttentionReference, DropoutScalesWhatItKeeps) {
  const double probability = 0.5;
  const AttentionProblem problem = two_keys({.dropout = probability, .seed = 3});
  attention_forward_reference(problem.forward_params());
  const auto keep = [&](std::int64_t key) {
    return dropout_keeps(3, dropout_threshold(probability), 0, 0, key) ? 2.0 : 0.0;
  };
  EXPECT_DOUBLE_EQ(problem.out.get(0, 0, 0, 0), 0.25 * keep(0) * 4.0 + 0.75 * keep(1) * 8.0);
  EXPECT_DOUBLE_EQ(problem.logsumexp.get(0, 0, 0, 0), std::log(4.0));
}

TEST(AttentionReference, DropoutSliceCountsQueryHeadsOfAllBatches) {
  AttentionCase spec{.dtype = ScalarType::kFloat64,
                     .batch_sizes = {1, 1, 2, 1},
                     .query_heads = 4,
                     .kv_heads = 2,
                     .q_len = 3,
                     .kv_len = 9,
                     .head_dim = 1,
                     .scale = 0.0,
                     .dropout = 0.25};
  AttentionProblem problem(spec);
  problem.value.fill([](auto, auto, auto, auto) { return 1.0; });
  attention_forward_reference(problem.forward_params());
  const std::uint32_t threshold = dropout_threshold(0.25);
  for (std::int64_t batch = 0; batch < 2; ++batch) {
    for (std::int64_t head = 0; head < 4; ++head) {
      for (std::int64_t row = 0; row < 3; ++row) {
        int kept = 0;
        for (std::int64_t key = 0; key < 9; ++key) {
          kept += dropout_keeps(1, threshold, batch * 4 + head, row, key);
        }
        EXPECT_NEAR(problem.out.get(batch, head, row, 0), kept / 9.0 * dropout_scale(threshold),
                    1e-15);
      }
    }
  }
}

TEST(AttentionReference, RowsWithoutKeysGiveZeros) {
  const AttentionProblem problem(
      {.kv_len = 4,
       .mask = {.kind = AttentionMaskKind::kAdditive, .pattern = MaskPattern::kHalfRows},
       .has_grad_logsumexp = true,
       .wants_grad_mask = true});
  attention_forward_reference(problem.forward_params());
  attention_backward_reference(problem.backward_params());
  for (std::int64_t row = 0; row < 8; ++row) {
    for (std::int64_t d = 0; d < 16; ++d) {
      EXPECT_EQ(problem.out.get(0, 1, row, d) == 0.0, row % 2 == 1);
      EXPECT_EQ(problem.grad_query.get(0, 1, row, d) == 0.0, row % 2 == 1);
    }
    EXPECT_EQ(problem.logsumexp.get(0, 1, row, 0) == -kInfinity, row % 2 == 1);
    EXPECT_EQ(problem.grad_mask.get(0, 1, row, 0) == 0.0, row % 2 == 1);
  }
}

TEST(AttentionReference, ReadsEveryLayoutAndDtypeAlike) {
  for (const ScalarType dtype :
       {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (const Layout layout : {Layout::kBshd, Layout::kSbhd, Layout::kHbsd, Layout::kPaddedRows,
                                Layout::kTransposed, Layout::kExpandedHeads}) {
      const AttentionProblem problem({.dtype = dtype,
                                      .batch_sizes = {2, 1, 1, 3},
                                      .query_heads = 4,
                                      .q_len = 3,
                                      .kv_len = 5,
                                      .head_dim = 6,
                                      .value_dim = 7,
                                      .layout = layout});
      const AttentionProblem exact = problem.as_float64();
      attention_forward_reference(problem.forward_params());
      attention_backward_reference(problem.backward_params());
      attention_forward_reference(exact.forward_params());
      attention_backward_reference(exact.backward_params());
      // Nothing but the rounding of the results.
      EXPECT_EQ(problem.out.values(), exact.out.as(dtype).values());
      EXPECT_EQ(problem.grad_query.values(), exact.grad_query.as(dtype).values());
      EXPECT_EQ(problem.grad_key.values(), exact.grad_key.as(dtype).values());
      EXPECT_EQ(problem.grad_value.values(), exact.grad_value.as(dtype).values());
      EXPECT_TRUE(gaps_intact({&problem.out, &problem.logsumexp, &problem.grad_query,
                               &problem.grad_key, &problem.grad_value}));
    }
  }
}

/// What the gradients are those of.
double objective(const AttentionProblem& problem) {
  attention_forward_reference(problem.forward_params());
  double sum = 0.0;
  const std::vector<double> out = problem.out.values();
  const std::vector<double> grad_out = problem.grad_out.values();
  for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * grad_out[i];
  if (problem.grad_logsumexp) {
    const std::vector<double> logsumexp = problem.logsumexp.values();
    const std::vector<double> grad = problem.grad_logsumexp.values();
    for (std::size_t i = 0; i < grad.size(); ++i) {
      if (logsumexp[i] != -kInfinity) sum += logsumexp[i] * grad[i];
    }
  }
  return sum;
}

/// Of the elements [0, 1) x ... of `input` that have places of their own.
void expect_gradient(const char* what, const AttentionProblem& problem, StridedTensor& input,
                     const StridedTensor& gradient, Broadcast broadcast = {}) {
  constexpr double kStep = 1e-4;  // error of the difference about kStep^2
  const TensorExtent& extent = input.extent();
  for (std::int64_t batch = 0; batch < (broadcast.batch ? 1 : extent.batch()); ++batch) {
    for (std::int64_t head = 0; head < (broadcast.heads ? 1 : extent.heads); ++head) {
      for (std::int64_t row = 0; row < (broadcast.rows ? 1 : extent.rows); ++row) {
        for (std::int64_t col = 0; col < (broadcast.cols ? 1 : extent.cols); ++col) {
          const double at = input.get(batch, head, row, col);
          input.set(batch, head, row, col, at + kStep);
          const double above = objective(problem);
          input.set(batch, head, row, col, at - kStep);
          const double below = objective(problem);
          input.set(batch, head, row, col, at);
          const double expected = at == -kInfinity ? 0.0 : (above - below) / (2 * kStep);
          ASSERT_NEAR(gradient.get(batch, head, row, col), expected, 1e-6)
              << what << " at " << batch << " " << head << " " << row << " " << col;
        }
      }
    }
  }
}

void expect_gradients(AttentionCase spec) {
  spec.dtype = ScalarType::kFloat64;
  spec.mask.dtype = ScalarType::kFloat64;
  SCOPED_TRACE(describe(spec));
  AttentionProblem problem(spec);
  attention_backward_reference(problem.backward_params());
  expect_gradient("query", problem, problem.query, problem.grad_query);
  expect_gradient("key", problem, problem.key, problem.grad_key);
  expect_gradient("value", problem, problem.value, problem.grad_value);
  if (spec.wants_grad_mask) {
    expect_gradient("mask", problem, problem.mask, problem.grad_mask, spec.mask.broadcast);
  }
}

TEST(AttentionReferenceGradient, Plain) {
  expect_gradients({.q_len = 3, .kv_len = 4, .head_dim = 3, .value_dim = 2});
}

TEST(AttentionReferenceGradient, EverythingTogether) {
  expect_gradients({.batch_sizes = {1, 2, 1, 1},
                    .query_heads = 4,
                    .kv_heads = 2,
                    .q_len = 4,
                    .kv_len = 5,
                    .head_dim = 2,
                    .value_dim = 3,
                    .scale = -0.7,
                    .mask = {.kind = AttentionMaskKind::kAdditive},
                    .key_padding = 0.3,
                    .is_causal = true,
                    .causal_offset = 1,
                    .dropout = 0.3,
                    .has_grad_logsumexp = true,
                    .wants_grad_mask = true});
}

TEST(AttentionReferenceGradient, MaskOfEveryBroadcast) {
  for (int bits = 0; bits < 16; ++bits) {
    expect_gradients({.batch_sizes = {1, 1, 1, 2},
                      .q_len = 2,
                      .kv_len = 3,
                      .head_dim = 2,
                      .mask = {.kind = AttentionMaskKind::kAdditive,
                               .pattern = MaskPattern::kFull,
                               .broadcast = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0,
                                             (bits & 8) != 0}},
                      .wants_grad_mask = true});
  }
}

}  // namespace
}  // namespace torch_ext::testing
