// adamw_step_ and sgd_step_ on the CPU.
#include <torch/library.h>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "list_entries.h"
#include "optimizer_step_call.h"

namespace torch_ext {
namespace {

struct CpuSteps {
  static StepRate rate(const char*, const at::Tensor& lr, at::TensorList) {
    return {lr.item<double>()};
  }
  static void step(const AdamList& list, at::TensorList) {
    kernel_table().adam_step(list.params, AtenTaskRunner(list_workers(list.elements)));
  }
  static void step(const SgdList& list, at::TensorList) {
    kernel_table().sgd_step(list.params, AtenTaskRunner(list_workers(list.elements)));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("adamw_step_", TORCH_FN((adamw_step<CpuSteps, double>)));
  m.impl("adamw_step_.tensor_lr", TORCH_FN((adamw_step<CpuSteps, const at::Tensor&>)));
  m.impl("sgd_step_", TORCH_FN((sgd_step<CpuSteps, double>)));
  m.impl("sgd_step_.tensor_lr", TORCH_FN((sgd_step<CpuSteps, const at::Tensor&>)));
}

}  // namespace torch_ext
