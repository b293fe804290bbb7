// linear_wgrad_ on CUDA devices: a cuBLASLt product that adds to the weight's gradient in place.
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "../../kernels/cuda/accumulation_kernels.h"
#include "../../kernels/cuda/lt_matmul.h"
#include "../cuda_float32_precision.h"
#include "accumulation_operators.h"
#include "list_params.h"
#include "weight_gradient_views.h"

namespace torch_ext {
namespace {

/// target = beta * target + addend
void add_to(const at::Tensor& target, const at::Tensor& addend, double beta) {
  const AccumulateList list(target, addend, beta, nullptr);
  C10_CUDA_CHECK(cuda::accumulate(list.params, c10::cuda::getCurrentCUDAStream()));
}

/// A matrix as cuBLAS takes one: rows, or columns, that lie one behind the other.
struct BlasLayout {
  bool is_row_major;
  std::int64_t stride;  // between rows, or columns
};

std::optional<BlasLayout> blas_layout(const at::Tensor& tensor) {
  const std::int64_t rows = tensor.size(0);
  const std::int64_t cols = tensor.size(1);
  const std::int64_t row_stride = rows == 1 ? std::max<std::int64_t>(cols, 1) : tensor.stride(0);
  const std::int64_t col_stride = cols == 1 ? 1 : tensor.stride(1);
  if (col_stride == 1 && row_stride >= cols) return BlasLayout{true, row_stride};
  const std::int64_t tall_stride = cols == 1 ? std::max<std::int64_t>(rows, 1) : tensor.stride(1);
  if ((rows == 1 ? 1 : tensor.stride(0)) == 1 && tall_stride >= rows) {
    return BlasLayout{false, tall_stride};
  }
  return std::nullopt;
}

at::Tensor with_blas_layout(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor typed = tensor.to(type);
  return blas_layout(typed).has_value() ? typed : typed.contiguous();
}

/// (rows, cols) as the stored matrix, or as the transpose of what is stored.
cuda::LtOperand lt_operand(const at::Tensor& tensor, bool as_transpose) {
  const BlasLayout layout = *blas_layout(tensor);
  // A row-major matrix is, column-major, its transpose.
  return {tensor.const_data_ptr(), layout.stride, layout.is_row_major != as_transpose};
}

/// The dtype in which grad_output and input meet.
at::ScalarType operand_type(const at::Tensor& grads, const at::Tensor& inputs,
                            const at::Tensor& weight) {
  for (const at::Tensor* tensor : {&grads, &inputs, &weight}) {
    if (tensor->scalar_type() == at::kDouble) return at::kDouble;
  }
  return grads.scalar_type() == inputs.scalar_type() ? grads.scalar_type() : at::kFloat;
}

class WeightGradientCall {
 public:
  WeightGradientCall(const at::Tensor& grads, const at::Tensor& inputs)
      : grads_(grads), inputs_(inputs) {}

  /// weight = beta * weight + grads^T inputs; `bias_sums`, if any, of the weight's dtype, = the sum
  /// of grads' rows. False: cuBLASLt cannot; nothing was done.
  bool run(const at::Tensor& weight, double beta, const at::Tensor* bias_sums) const {
    const BlasLayout layout = *blas_layout(weight);
    cuda::LtMatmul product{.k = grads_.size(0),
                           .type = kernel_scalar_type(grads_.scalar_type()),
                           .d = weight.mutable_data_ptr(),
                           .d_stride = layout.stride,
                           .d_type = kernel_scalar_type(weight.scalar_type()),
                           .beta = beta,
                           .allow_tf32 = allows_tf32()};
    // A row-major (out, in) is a column-major (in, out) = inputs^T grads.
    product.m = weight.size(layout.is_row_major ? 1 : 0);
    product.n = weight.size(layout.is_row_major ? 0 : 1);
    product.a = lt_operand(layout.is_row_major ? inputs_ : grads_, true);
    product.b = lt_operand(layout.is_row_major ? grads_ : inputs_, false);
    if (bias_sums != nullptr) {
      product.bias_gradient =
          layout.is_row_major ? cuda::LtBiasGradient::kOfColumns : cuda::LtBiasGradient::kOfRows;
      product.bias = bias_sums->mutable_data_ptr();
    }
    const std::size_t bytes =
        cuda::lt_workspace_bytes(at::cuda::getCurrentDeviceProperties()->major);
    const at::DataPtr workspace = c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
    const cublasStatus_t status =
        cuda::lt_matmul(at::cuda::getCurrentCUDABlasLtHandle(), product, weight.get_device(),
                        workspace.get(), bytes, c10::cuda::getCurrentCUDAStream());
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return false;
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS,
                "torch_ext::linear_wgrad_: cuBLASLt failed: ", cublasLtGetStatusString(status));
    return true;
  }

 private:
  const at::Tensor& grads_;   // (tokens, out_features)
  const at::Tensor& inputs_;  // (tokens, in_features)
};

void linear_wgrad_cuda(const at::Tensor& weight_grad, const OptionalTensor& bias_grad,
                       const at::Tensor& grad_output, const at::Tensor& input, double beta) {
  const at::Tensor* bias = given(bias_grad);
  check_weight_gradient({weight_grad, bias, grad_output, input});
  const c10::cuda::CUDAGuard guard(weight_grad.device());
  const at::Tensor flat_grads = flatten_tokens(grad_output);
  const at::Tensor flat_inputs = flatten_tokens(input);
  const auto add_bias_of_rows = [&] {
    const at::ScalarType type = flat_grads.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (bias != nullptr) add_to(*bias, at::sum(flat_grads, {0}, /*keepdim=*/false, type), beta);
  };
  if (flat_grads.size(0) == 0 || weight_grad.numel() == 0) {
    beta == 0.0 ? weight_grad.zero_() : weight_grad.mul_(beta);
    return add_bias_of_rows();
  }

  const at::ScalarType type = operand_type(flat_grads, flat_inputs, weight_grad);
  const at::Tensor grads = with_blas_layout(flat_grads, type);
  const at::Tensor inputs = with_blas_layout(flat_inputs, type);
  const WeightGradientCall call(grads, inputs);
  // Where cuBLASLt cannot add to the gradient itself, to a dense product that is then added.
  const bool is_direct =
      blas_layout(weight_grad).has_value() &&
      cuda::lt_takes(kernel_scalar_type(type), kernel_scalar_type(weight_grad.scalar_type()));
  const at::Tensor product =
      is_direct ? weight_grad
                : at::empty(weight_grad.sizes(),
                            weight_grad.options().dtype(type == at::kDouble ? type : at::kFloat));
  const double product_beta = is_direct ? beta : 0.0;

  bool has_bias = false;
  if (bias != nullptr) {
    // The epilogue overwrites, so what is there is added afterwards.
    const bool is_bias_direct =
        beta == 0.0 && bias->is_contiguous() && bias->scalar_type() == product.scalar_type();
    const at::Tensor sums = is_bias_direct ? *bias : at::empty({bias->size(0)}, product.options());
    has_bias = call.run(product, product_beta, &sums);
    if (has_bias && !is_bias_direct) add_to(*bias, sums, beta);
  }
  if (!has_bias) {
    TORCH_CHECK(call.run(product, product_beta, nullptr),
                "torch_ext::linear_wgrad_: cuBLASLt has no algorithm for grad_output ",
                grad_output.sizes(), " and input ", input.sizes(), " of ", type);
    add_bias_of_rows();
  }
  if (!is_direct) add_to(weight_grad, product, beta);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CUDA, m) { m.impl("linear_wgrad_", TORCH_FN(linear_wgrad_cuda)); }

}  // namespace torch_ext
