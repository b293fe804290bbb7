// Random problems with any features together, and the independence of results from the workers.
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

class AttentionRandom : public AttentionKernelTest {};

TEST_P(AttentionRandom, AgreesWithTheReference) {
  check_cases(kernel(), thinned(random_cases(2026, 600)), /*forward_only=*/false);
}

class AttentionWorkers : public AttentionKernelTest {
 protected:
  /// The bytes of everything that forward and backward write.
  std::vector<std::vector<std::uint8_t>> results(const AttentionCase& spec,
                                                 const TaskRunner& runner) const {
    const AttentionProblem problem(spec);
    run_forward(kernel(), problem, runner);
    run_backward(kernel(), problem, runner);
    return {problem.out.bytes(),      problem.logsumexp.bytes(),  problem.grad_query.bytes(),
            problem.grad_key.bytes(), problem.grad_value.bytes(), problem.grad_mask.bytes()};
  }

  void expect_same_results(const AttentionCase& spec) const {
    const auto expected = results(spec, SerialTaskRunner());
    std::vector<std::unique_ptr<TaskRunner>> runners;
    for (const int workers : {2, 3, 7}) {
      runners.push_back(std::make_unique<ThreadTaskRunner>(workers, workers));
    }
    runners.push_back(std::make_unique<ReversedTaskRunner>(3));
    for (const auto& runner : runners) {
      ASSERT_EQ(results(spec, *runner), expected)
          << runner->num_workers() << " workers: " << describe(spec);
    }
  }
};

TEST_P(AttentionWorkers, DoNotChangeABit) {
  CaseList cases;
  for (const ScalarType dtype : kAllDtypes) {
    // Rows and heads, splits and chunks, decode, shared mask gradients.
    const AttentionCase base{.dtype = dtype, .q_len = 150, .kv_len = 150, .head_dim = 24};
    cases.push_back(base);
    AttentionCase spec = base;
    spec.is_causal = true;
    spec.dropout = 0.1;
    cases.push_back(spec);
    spec.query_heads = spec.kv_heads = 1;
    spec.q_len = 30;
    spec.kv_len = 1100;
    spec.causal_offset = 1000;
    cases.push_back(spec);
    spec.q_len = 3;
    cases.push_back(spec);
    spec = base;
    spec.batch_sizes = {1, 1, 3, 1};
    spec.q_len = 20;
    spec.kv_len = 520;
    spec.query_heads = 4;
    spec.head_dim = 8;
    spec.mask.kind = AttentionMaskKind::kAdditive;
    spec.wants_grad_mask = true;
    for (int bits = 0; bits < 8; ++bits) {
      spec.mask.broadcast = {.batch = (bits & 1) != 0,
                             .heads = (bits & 2) != 0,
                             .rows = true,
                             .cols = (bits & 4) != 0};
      cases.push_back(spec);
    }
  }
  for (const AttentionCase& spec : thinned(cases)) expect_same_results(spec);
}

TEST_P(AttentionWorkers, DoNotChangeABitOfRandomProblems) {
  for (const AttentionCase& spec : thinned(random_cases(77, 60))) expect_same_results(spec);
}

TORCH_EXT_TEST_EACH_ISA(AttentionRandom);
TORCH_EXT_TEST_EACH_ISA(AttentionWorkers);

}  // namespace
}  // namespace torch_ext::testing
