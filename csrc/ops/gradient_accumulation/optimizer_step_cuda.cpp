// adamw_step_ and sgd_step_ on CUDA devices.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/accumulation_kernels.h"
#include "list_entries.h"
#include "optimizer_step_call.h"

namespace torch_ext {
namespace {

struct CudaSteps {
  /// A rate on the device is read there: torch's capturable optimizers change it between the
  /// replays of a graph.
  static StepRate rate(const char* op, const at::Tensor& lr, at::TensorList params) {
    if (lr.is_cpu()) return {lr.item<double>()};
    TORCH_CHECK(lr.device() == params[0].device(), "torch_ext::", op,
                ": lr takes a tensor on cpu or on ", params[0].device(), ", got one on ",
                lr.device());
    return {0.0, const_operand(lr)};
  }

  static void step(const AdamList& list, at::TensorList params) {
    const c10::cuda::CUDAGuard guard(params[0].device());
    const at::DataPtr workspace =
        c10::cuda::CUDACachingAllocator::get()->allocate(cuda::adam_step_workspace(list.params));
    C10_CUDA_CHECK(
        cuda::adam_step(list.params, workspace.get(), c10::cuda::getCurrentCUDAStream()));
  }

  static void step(const SgdList& list, at::TensorList params) {
    const c10::cuda::CUDAGuard guard(params[0].device());
    C10_CUDA_CHECK(cuda::sgd_step(list.params, c10::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) {
  m.impl("adamw_step_", TORCH_FN((adamw_step<CudaSteps, double>)));
  m.impl("adamw_step_.tensor_lr", TORCH_FN((adamw_step<CudaSteps, const at::Tensor&>)));
  m.impl("sgd_step_", TORCH_FN((sgd_step<CudaSteps, double>)));
  m.impl("sgd_step_.tensor_lr", TORCH_FN((sgd_step<CudaSteps, const at::Tensor&>)));
}

}  // namespace torch_ext
