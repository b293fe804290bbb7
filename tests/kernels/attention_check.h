// Runs a kernel on a problem and compares all it wrote to the double-precision reference.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "attention_case.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/task_runner.h"

namespace torch_ext::testing {

/// Relative errors that a result may have.
struct ErrorBound {
  double norm;     // || result - expected || / || expected ||
  double element;  // max | result - expected | / max | expected |
};

/// The bounds of each `dtype`.
ErrorBound forward_bound(ScalarType dtype);
ErrorBound logsumexp_bound(ScalarType dtype);
ErrorBound gradient_bound(ScalarType dtype);

/// Expects `actual` within the bound of `expected`. `rounding_scale` is the typical size of the
/// terms that an element sums up: where they cancel, the error is relative to them instead. NaN and
/// infinities must be where they are expected. The rounding of large scores makes every result
/// worse; beyond the bound an error is compared with those of `others`, results by other orders of
/// the same operations: at most kErrorFactor times the largest.
using OtherResults = std::function<std::vector<std::vector<double>>()>;
inline constexpr double kErrorFactor = 6.0;
void expect_close(const std::string& what, const std::vector<double>& actual,
                  const std::vector<double>& expected, ErrorBound bound, double rounding_scale,
                  const OtherResults& others);

/// Runs the forward kernel in a workspace of exactly the bytes it asked for, filled with NaN, and
/// expects nothing to change but `problem.out` and `problem.logsumexp`. Returns the path.
std::string run_forward(const KernelTable& kernel, const AttentionProblem& problem,
                        const TaskRunner& runner);
std::string run_backward(const KernelTable& kernel, const AttentionProblem& problem,
                         const TaskRunner& runner);

/// Forward and backward of the kernel against the reference. The backward pass gets the kernel's
/// own out and logsumexp. Returns whether all was as expected.
bool check_attention(const KernelTable& kernel, const AttentionProblem& problem);
bool check_attention(const KernelTable& kernel, const AttentionCase& spec);

}  // namespace torch_ext::testing
