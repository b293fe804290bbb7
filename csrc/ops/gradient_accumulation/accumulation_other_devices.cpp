// Where no backend's kernel takes a call: empty lists, which have no device, and devices without
// kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "accumulation_operators.h"

namespace torch_ext {
namespace {

void expect_empty(const char* op, at::TensorList tensors) {
  if (tensors.empty()) return;
  TORCH_CHECK(false, "torch_ext::", op, ": there is no kernel for tensors on ", tensors[0].device(),
              " in this build");
}

template <typename Op, typename Signature = typename Op::Signature>
struct EmptyLists;

template <typename Op, typename... Args>
struct EmptyLists<Op, void(at::TensorList, at::TensorList, Args...)> {
  static void run(at::TensorList first, at::TensorList second, Args...) {
    expect_empty(Op::kName, first);
    TORCH_CHECK(second.empty(), "torch_ext::", Op::kName, ": takes lists of one length, got 0 and ",
                second.size(), " entries");
  }
};

GradStatsResult grad_stats_of_none(at::TensorList grads) {
  expect_empty("grad_stats", grads);
  return {at::zeros({}), at::zeros({0}), at::zeros({})};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CompositeExplicitAutograd, m) {
  m.impl("grad_accumulate_", TORCH_FN(EmptyLists<GradAccumulate>::run));
  m.impl("adamw_step_", TORCH_FN(EmptyLists<AdamwStep<double>>::run));
  m.impl("sgd_step_", TORCH_FN(EmptyLists<SgdStep<double>>::run));
  m.impl("grad_stats", TORCH_FN(grad_stats_of_none));
}

}  // namespace torch_ext
