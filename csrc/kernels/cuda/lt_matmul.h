// One matrix product through cuBLASLt, in its notation: column-major matrices.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../strided_view.h"

namespace torch_ext::cuda {

struct LtOperand {
  const void* data = nullptr;
  std::int64_t stride = 0;     // between columns as stored
  bool is_transposed = false;  // stored as its transpose
};

/// Where the sums over k of an operand go, with the product's dtype.
enum class LtBiasGradient : std::uint8_t { kNone, kOfRows, kOfColumns };

/// d (m, n) = a (m, k) b (k, n) + beta d.
struct LtMatmul {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  LtOperand a{};
  LtOperand b{};
  ScalarType type = ScalarType::kFloat32;  // of a and b
  void* d = nullptr;
  std::int64_t d_stride = 0;
  ScalarType d_type = ScalarType::kFloat32;
  double beta = 0.0;
  bool allow_tf32 = false;
  LtBiasGradient bias_gradient = LtBiasGradient::kNone;
  void* bias = nullptr;  // kOfRows: (m), the sums of a; kOfColumns: (n), the sums of b
};

/// Whether cuBLASLt knows the dtypes: double throughout, or 16-bit or float operands with a product
/// of float or of their own.
constexpr bool lt_takes(ScalarType type, ScalarType d_type) {
  if (type == ScalarType::kFloat64 || d_type == ScalarType::kFloat64) return type == d_type;
  return d_type == ScalarType::kFloat32 || d_type == type;
}

/// Memory that the fastest algorithms want.
std::size_t lt_workspace_bytes(int compute_capability_major);

/// Enqueues it. CUBLAS_STATUS_NOT_SUPPORTED: there is no algorithm, as for some bias gradients;
/// then nothing was done. The algorithm is looked up once for each kind of product.
cublasStatus_t lt_matmul(cublasLtHandle_t handle, const LtMatmul& product, int device,
                         void* workspace, std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace torch_ext::cuda
