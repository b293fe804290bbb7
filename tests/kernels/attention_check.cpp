#include "attention_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "guarded_buffer.h"
#include "kernels/reference/attention_reference.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr std::size_t kWorkspaceAlignment = 64;

double root_mean_square(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += std::isfinite(value) ? value * value : 0.0;
  return values.empty() ? 0.0 : std::sqrt(sum / static_cast<double>(values.size()));
}

int failures_so_far() {
  return ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
}

template <typename Params>
std::string run_kernel(const char* what, std::size_t (*workspace_bytes)(const Params&, int),
                       KernelPath (*kernel)(const Params&, const TaskRunner&, void*),
                       const Params& params, const TaskRunner& runner) {
  GuardedBuffer workspace(workspace_bytes(params, runner.num_workers()), GuardSide::kBack,
                          kWorkspaceAlignment);
  const char* path = kernel(params, runner, workspace.data());
  EXPECT_TRUE(workspace.surroundings_intact()) << what << " wrote outside its workspace";
  if (path == nullptr) {
    ADD_FAILURE() << what << " named no path";
    return "";
  }
  const std::string name = path;
  EXPECT_TRUE(name.rfind("cpu.", 0) == 0 || name.rfind("cuda.", 0) == 0) << name;
  return name;
}

}  // namespace

ErrorBound forward_bound(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return {1e-13, 1e-12};
    case ScalarType::kBFloat16:
      return {0x1p-8, 0x1p-6};
    case ScalarType::kFloat16:
      return {0x1p-10, 0x1p-8};
    default:
      return {3e-6, 2e-5};
  }
}

// Scores and their sum are in the accumulation type. Weights that are rounded to bf16 come from a
// shorter polynomial (7.5e-5).
ErrorBound logsumexp_bound(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return {1e-13, 1e-12};
    case ScalarType::kBFloat16:
      return {1e-4, 3e-4};
    default:
      return {3e-6, 2e-5};
  }
}

ErrorBound gradient_bound(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return {1e-13, 1e-12};
    case ScalarType::kBFloat16:
      return {0x1p-7, 0x1p-5};
    case ScalarType::kFloat16:
      return {0x1p-10, 0x1p-8};
    default:
      return {9e-6, 6e-5};
  }
}

namespace {

struct Errors {
  double squares = 0.0;  // the sum of them
  double largest = 0.0;
  std::size_t worst = 0;
};

Errors errors_of(const std::vector<double>& actual, const std::vector<double>& expected) {
  Errors errors;
  for (std::size_t index = 0; index < actual.size(); ++index) {
    if (!std::isfinite(expected[index]) || !std::isfinite(actual[index])) continue;
    const double error = std::fabs(actual[index] - expected[index]);
    errors.squares += error * error;
    if (error > errors.largest) {
      errors.largest = error;
      errors.worst = index;
    }
  }
  return errors;
}

/// The problem's results by the formula written out, with the products of a score in either order.
class WrittenOut {
 public:
  explicit WrittenOut(const AttentionProblem& problem) : problem_(problem) {}

  OtherResults of(StridedTensor AttentionProblem::*tensor) {
    return [this, tensor] {
      if (results_.empty()) compute();
      std::vector<std::vector<double>> values;
      for (const AttentionProblem& result : results_) values.push_back((result.*tensor).values());
      return values;
    };
  }

 private:
  void compute() {
    for (const DotOrder order : {DotOrder::kFirstToLast, DotOrder::kLastToFirst}) {
      results_.push_back(problem_.with_new_outputs());
      attention_forward_written_out(results_.back().forward_params(), order);
      if (!problem_.spec.forward_only) {
        attention_backward_written_out(results_.back().backward_params(), order);
      }
    }
  }

  const AttentionProblem& problem_;
  std::vector<AttentionProblem> results_;
};

}  // namespace

void expect_close(const std::string& what, const std::vector<double>& actual,
                  const std::vector<double>& expected, ErrorBound bound, double rounding_scale,
                  const OtherResults& others) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double expected_squared = 0.0;
  double largest_expected = 0.0;
  for (std::size_t index = 0; index < actual.size(); ++index) {
    if (!std::isfinite(expected[index]) || !std::isfinite(actual[index])) {
      const bool same = std::isnan(expected[index]) ? std::isnan(actual[index])
                                                    : expected[index] == actual[index];
      ASSERT_TRUE(same) << what << "[" << index << "] of " << actual.size() << " is "
                        << actual[index] << ", expected " << expected[index];
      continue;
    }
    expected_squared += expected[index] * expected[index];
    largest_expected = std::max(largest_expected, std::fabs(expected[index]));
  }
  if (actual.empty()) return;
  const Errors errors = errors_of(actual, expected);
  const double norm_scale =
      std::sqrt(expected_squared) + rounding_scale * std::sqrt(static_cast<double>(actual.size()));
  double norm_bound = bound.norm * norm_scale;
  double element_bound = bound.element * (largest_expected + rounding_scale);
  if (std::sqrt(errors.squares) > norm_bound || errors.largest > element_bound) {
    for (const std::vector<double>& other : others()) {
      const Errors theirs = errors_of(other, expected);
      norm_bound = std::max(norm_bound, kErrorFactor * std::sqrt(theirs.squares));
      element_bound = std::max(element_bound, kErrorFactor * theirs.largest);
    }
  }
  const auto worst = [&] {
    std::ostringstream text;
    text << "[" << errors.worst << "] of " << actual.size() << ": " << actual[errors.worst]
         << ", expected " << expected[errors.worst];
    return text.str();
  };
  EXPECT_LE(std::sqrt(errors.squares), norm_bound)
      << what << ": relative error " << std::sqrt(errors.squares) / norm_scale
      << " in norm, worst at " << worst();
  EXPECT_LE(errors.largest, element_bound) << what << worst();
}

std::string run_forward(const KernelTable& kernel, const AttentionProblem& problem,
                        const TaskRunner& runner) {
  const std::string path = run_kernel("forward", kernel.attention_forward_workspace,
                                      kernel.attention_forward, problem.forward_params(), runner);
  EXPECT_TRUE(gaps_intact({&problem.out, &problem.logsumexp}))
      << "forward wrote outside its outputs";
  return path;
}

std::string run_backward(const KernelTable& kernel, const AttentionProblem& problem,
                         const TaskRunner& runner) {
  const std::string path = run_kernel("backward", kernel.attention_backward_workspace,
                                      kernel.attention_backward, problem.backward_params(), runner);
  EXPECT_TRUE(gaps_intact({&problem.grad_query, &problem.grad_key, &problem.grad_value,
                           &problem.grad_mask, &problem.grad_sink}))
      << "backward wrote outside its gradients";
  return path;
}

bool check_attention(const KernelTable& kernel, const AttentionProblem& problem) {
  SCOPED_TRACE(describe(problem.spec));
  const int failures_before = failures_so_far();
  const AttentionCase& spec = problem.spec;
  const AttentionShape& shape = problem.shape;
  const ThreadTaskRunner runner(2);
  const AttentionProblem exact = problem.as_float64();
  WrittenOut formula(problem);

  attention_forward_reference(exact.forward_params());
  run_forward(kernel, problem, runner);
  const auto scaled = [&](ErrorBound bound) {
    return ErrorBound{bound.norm * spec.tolerance_factor, bound.element * spec.tolerance_factor};
  };
  const ErrorBound forward = scaled(forward_bound(spec.dtype));
  const double value_size = root_mean_square(exact.value.values());
  const double rows = static_cast<double>(shape.batch() * shape.query_heads * shape.q_len);
  // Keys that a row attends to, on average over the rows.
  const double attended =
      rows == 0.0 ? 1.0 : std::max(1.0, static_cast<double>(problem.count_attended_pairs()) / rows);
  expect_close("out", problem.out.values(), exact.out.values(), forward,
               value_size / std::sqrt(attended), formula.of(&AttentionProblem::out));
  if (spec.wants_logsumexp) {
    expect_close("logsumexp", problem.logsumexp.values(), exact.logsumexp.values(),
                 scaled(logsumexp_bound(spec.dtype)), 1.0,
                 formula.of(&AttentionProblem::logsumexp));
  }
  if (spec.forward_only || failures_so_far() != failures_before) {
    return failures_so_far() == failures_before;
  }

  attention_backward_reference(exact.backward_params());
  run_backward(kernel, problem, runner);
  const ErrorBound gradient = scaled(gradient_bound(spec.dtype));
  // dP is a sum of value_dim products; dS = P (dP - delta) with P about 1 / attended.
  double grad_weight_size = root_mean_square(exact.grad_out.values()) * value_size *
                            std::sqrt(static_cast<double>(shape.value_dim));
  if (spec.dropout > 0.0 && spec.dropout < 1.0) grad_weight_size /= std::sqrt(1.0 - spec.dropout);
  if (spec.has_grad_logsumexp) grad_weight_size += 1.0;
  // Equal rows or columns add up without cancelling, and so do their roundings.
  double key_terms = std::sqrt(attended);
  if (spec.layout == Layout::kExpandedRows || spec.layout == Layout::kExpandedAll) key_terms = 1.0;
  if (spec.layout == Layout::kExpandedAll) {
    grad_weight_size *= std::sqrt(static_cast<double>(std::max<std::int64_t>(1, shape.value_dim)));
  }
  const double queries = std::max(
      1.0, rows / static_cast<double>(std::max<std::int64_t>(1, shape.batch() * shape.kv_heads)));
  const double scale = std::fabs(problem.scale);
  expect_close("grad_query", problem.grad_query.values(), exact.grad_query.values(), gradient,
               scale * grad_weight_size * root_mean_square(exact.key.values()) / key_terms,
               formula.of(&AttentionProblem::grad_query));
  expect_close("grad_key", problem.grad_key.values(), exact.grad_key.values(), gradient,
               scale * grad_weight_size * root_mean_square(exact.query.values()) *
                   std::sqrt(queries) / attended,
               formula.of(&AttentionProblem::grad_key));
  expect_close("grad_value", problem.grad_value.values(), exact.grad_value.values(), gradient,
               root_mean_square(exact.grad_out.values()) * std::sqrt(queries) / attended,
               formula.of(&AttentionProblem::grad_value));
  if (spec.wants_grad_mask) {
    double reduced =
        static_cast<double>(std::max<std::int64_t>(1, exact.grad_mask.extent().count())) /
        static_cast<double>(std::max<std::size_t>(1, exact.grad_mask.storage()->size() / 8));
    if (layout_is_writable(spec.layout)) reduced = std::sqrt(reduced);
    expect_close("grad_mask", problem.grad_mask.values(), exact.grad_mask.values(), gradient,
                 grad_weight_size * reduced / attended, formula.of(&AttentionProblem::grad_mask));
  }
  if (spec.sink) {
    expect_close("grad_sink", problem.grad_sink.values(), exact.grad_sink.values(), gradient,
                 grad_weight_size * std::sqrt(static_cast<double>(shape.q_len)) / attended,
                 formula.of(&AttentionProblem::grad_sink));
  }
  return failures_so_far() == failures_before;
}

bool check_attention(const KernelTable& kernel, const AttentionCase& spec) {
  return check_attention(kernel, AttentionProblem(spec));
}

}  // namespace torch_ext::testing
