// The CUDA kernels where fp32 may be rounded to TF32, run on the host and on a GPU, against the
// reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "cuda_attention_kernels.h"
#include "cuda_case_list.h"
#include "kernels/cuda/cuda_attention_schedule.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

/// TF32 has 11 bits of precision, fp32 24; the bounds of fp32 leave room for sums.
constexpr double kTf32Tolerance = 300.0;

CaseList tolerant(CaseList cases) {
  for (AttentionCase& spec : cases) {
    spec.tolerance_factor *= kTf32Tolerance;
    // Of a score of 1000, half remains uncertain.
    spec.magnitude = 1.0;
  }
  return cases;
}

class CudaAttentionTf32 : public CudaAttentionTest {
 protected:
  void check(CaseList (*cases)(ScalarType), std::size_t step) const {
    check_cases(*GetParam().tf32, tolerant(every(step, cases(ScalarType::kFloat32))),
                /*forward_only=*/false);
  }
};

CaseList aligned_tf32_cases() {
  return tolerant(aligned_cases({ScalarType::kFloat32}, {64, 128, 40}));
}

TEST_P(CudaAttentionTf32, AlignedRows) {
  check_cases(*GetParam().tf32, every(1, aligned_tf32_cases()), /*forward_only=*/false);
}
TEST_P(CudaAttentionTf32, DeterministicAlignedRows) {
  check_cases(*GetParam().deterministic_tf32, every(2, aligned_tf32_cases()),
              /*forward_only=*/false);
}
TEST_P(CudaAttentionTf32, TileEdges) { check(tile_edge_cases, 19); }
TEST_P(CudaAttentionTf32, HeadDims) { check(head_dim_cases, 4); }
TEST_P(CudaAttentionTf32, ZeroSizes) { check(zero_sized_cases, 7); }
TEST_P(CudaAttentionTf32, Layouts) { check(layout_cases, 5); }
TEST_P(CudaAttentionTf32, BatchesAndGroups) { check(batch_and_group_cases, 7); }
TEST_P(CudaAttentionTf32, Causal) { check(causal_cases, 9); }
TEST_P(CudaAttentionTf32, BooleanMasks) { check(boolean_mask_cases, 7); }
TEST_P(CudaAttentionTf32, AdditiveMasks) { check(additive_mask_cases, 7); }
TEST_P(CudaAttentionTf32, KeyPadding) { check(key_padding_cases, 3); }
TEST_P(CudaAttentionTf32, Scales) { check(scale_cases, 2); }
TEST_P(CudaAttentionTf32, Dropout) { check(dropout_cases, 4); }
TEST_P(CudaAttentionTf32, Splits) { check(split_cases, 5); }

/// Which way a call goes, and that TF32 is what comes out: not exact.
TEST_P(CudaAttentionTf32, IsTakenWhereItIsAllowedAlone) {
  const auto path = [](const KernelTable& kernel, std::int64_t q_len, std::int64_t head_dim,
                       ScalarType dtype, bool backward) {
    const AttentionProblem problem(
        {.dtype = dtype, .q_len = q_len, .kv_len = 70, .head_dim = head_dim});
    std::string taken = run_forward(kernel, problem, SerialTaskRunner());
    if (backward) taken = run_backward(kernel, problem, SerialTaskRunner());
    return taken;
  };
  for (const bool backward : {false, true}) {
    EXPECT_EQ(path(*GetParam().tf32, 70, 64, ScalarType::kFloat32, backward), "cuda.tf32_tile");
    EXPECT_EQ(path(*GetParam().tf32, 70, 128, ScalarType::kFloat32, backward), "cuda.tf32_tile");
    EXPECT_EQ(path(*GetParam().tf32, 70, 130, ScalarType::kFloat32, backward), "cuda.scalar");
    EXPECT_EQ(path(*GetParam().tf32, 70, 64, ScalarType::kFloat64, backward), "cuda.scalar");
    EXPECT_EQ(path(*GetParam().tf32, 70, 64, ScalarType::kBFloat16, backward), "cuda.tile");
    EXPECT_EQ(path(*GetParam().standard, 70, 64, ScalarType::kFloat32, backward), "cuda.scalar");
  }
  EXPECT_EQ(path(*GetParam().tf32, 4, 64, ScalarType::kFloat32, false), "cuda.tf32_decode");
}

/// Forward fits every GPU; the widest pass over the keys does not.
TEST(CudaAttentionTf32Schedule, StaysExactWhereSharedMemoryIsShort) {
  for (const auto& [head_dim, limit, expected] : {std::tuple{64, 99, cuda::CudaPath::kTensorCore},
                                                  {128, 99, cuda::CudaPath::kScalar},
                                                  {128, 163, cuda::CudaPath::kTensorCore},
                                                  {130, 227, cuda::CudaPath::kScalar}}) {
    const AttentionProblem problem({.q_len = 8, .kv_len = 8, .head_dim = head_dim});
    const cuda::CudaBackwardSchedule schedule = cuda::schedule_backward(
        problem.backward_params(),
        {.shared_limit = static_cast<std::size_t>(limit) * 1024, .allow_tf32 = true});
    EXPECT_EQ(schedule.path, expected) << "head_dim " << head_dim << ", " << limit << " KB";
  }
}

TEST_P(CudaAttentionTf32, RoundsOperands) {
  const AttentionCase spec{.q_len = 70, .kv_len = 70, .head_dim = 64};
  const AttentionProblem rounded(spec);
  const AttentionProblem exact(spec);
  run_forward(*GetParam().tf32, rounded, SerialTaskRunner());
  run_forward(*GetParam().standard, exact, SerialTaskRunner());
  const std::vector<double> a = rounded.out.values();
  const std::vector<double> b = exact.out.values();
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  EXPECT_GT(largest, 1e-5);
  EXPECT_LT(largest, 1e-2);
}

TEST_P(CudaAttentionTf32, Random) {
  CaseList cases;
  for (AttentionCase& spec : random_cases(2028, 900)) {
    if (spec.dtype == ScalarType::kFloat32) cases.push_back(spec);
  }
  cases = tolerant(cases);
  check_cases(*GetParam().tf32, every(5, cases), /*forward_only=*/false);
  check_cases(*GetParam().deterministic_tf32, every(7, cases), /*forward_only=*/false);
}

TORCH_EXT_TEST_EACH_CUDA_ATTENTION(CudaAttentionTf32);

}  // namespace
}  // namespace torch_ext::testing
