#include "lt_matmul.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>

namespace torch_ext::cuda {
namespace {

cudaDataType_t data_type(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
      return CUDA_R_64F;
    case ScalarType::kBFloat16:
      return CUDA_R_16BF;
    case ScalarType::kFloat16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

/// The largest power of two up to 256 that divides the address: cuBLASLt asks for no more.
std::uint32_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data) | 256;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

/// A descriptor of cuBLASLt's, destroyed with its scope.
template <typename Handle, cublasStatus_t (*kDestroy)(Handle)>
struct Descriptor {
  Handle handle = nullptr;
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (handle != nullptr) kDestroy(handle);
  }
};
using Operation = Descriptor<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Descriptor<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Descriptor<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

/// Remembers the first failure of a sequence of calls.
class Calls {
 public:
  bool operator()(cublasStatus_t status) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = status;
    return status_ == CUBLAS_STATUS_SUCCESS;
  }
  template <typename Value>
  void set(cublasLtMatmulDesc_t target, cublasLtMatmulDescAttributes_t attribute,
           const Value& value) {
    (*this)(cublasLtMatmulDescSetAttribute(target, attribute, &value, sizeof value));
  }
  template <typename Value>
  void set(cublasLtMatmulPreference_t target, cublasLtMatmulPreferenceAttributes_t attribute,
           const Value& value) {
    (*this)(cublasLtMatmulPreferenceSetAttribute(target, attribute, &value, sizeof value));
  }
  cublasStatus_t status() const { return status_; }

 private:
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

// Everything that the choice of an algorithm looks at.
using Key = std::array<std::int64_t, 12>;

Key key_of(const LtMatmul& p, int device, std::size_t workspace_bytes) {
  const std::int64_t kinds =
      static_cast<std::int64_t>(p.type) | static_cast<std::int64_t>(p.d_type) << 4 |
      static_cast<std::int64_t>(p.bias_gradient) << 8 | std::int64_t{p.allow_tf32} << 12 |
      std::int64_t{p.a.is_transposed} << 13 | std::int64_t{p.b.is_transposed} << 14 |
      std::int64_t{p.beta == 0.0} << 15;
  return {device,
          p.m,
          p.n,
          p.k,
          p.a.stride,
          p.b.stride,
          p.d_stride,
          kinds,
          alignment_of(p.a.data),
          alignment_of(p.b.data),
          alignment_of(p.d) | std::int64_t{alignment_of(p.bias)} << 32,
          static_cast<std::int64_t>(workspace_bytes)};
}

struct KeyHash {
  std::size_t operator()(const Key& key) const {
    std::uint64_t hash = 0;
    for (const std::int64_t number : key) {
      hash = (hash ^ static_cast<std::uint64_t>(number)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return static_cast<std::size_t>(hash);
  }
};

struct Choice {
  bool found = false;
  cublasLtMatmulAlgo_t algorithm{};
};

/// Shared by all threads. Ragged batches bring new shapes for ever: then it starts anew.
class ChoiceCache {
 public:
  bool find(const Key& key, Choice& choice) {
    const std::lock_guard lock(mutex_);
    const auto place = choices_.find(key);
    if (place == choices_.end()) return false;
    choice = place->second;
    return true;
  }
  void put(const Key& key, const Choice& choice) {
    const std::lock_guard lock(mutex_);
    if (choices_.size() >= kMaxChoices) choices_.clear();
    choices_.emplace(key, choice);
  }

 private:
  static constexpr std::size_t kMaxChoices = 4096;
  std::mutex mutex_;
  std::unordered_map<Key, Choice, KeyHash> choices_;
};

struct Problem {
  Operation operation;
  Layout a, b, d;
};

void describe(const LtMatmul& p, Problem& problem, Calls& calls) {
  const bool is_double = p.type == ScalarType::kFloat64;
  const cublasComputeType_t compute = is_double ? CUBLAS_COMPUTE_64F
                                      : p.allow_tf32 && p.type == ScalarType::kFloat32
                                          ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F;
  const auto layout = [&](Layout& target, const LtOperand& operand, ScalarType type,
                          std::int64_t rows, std::int64_t cols) {
    if (operand.is_transposed) std::swap(rows, cols);
    calls(cublasLtMatrixLayoutCreate(&target.handle, data_type(type),
                                     static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(cols), operand.stride));
  };
  layout(problem.a, p.a, p.type, p.m, p.k);
  layout(problem.b, p.b, p.type, p.k, p.n);
  layout(problem.d, {p.d, p.d_stride, false}, p.d_type, p.m, p.n);
  if (!calls(cublasLtMatmulDescCreate(&problem.operation.handle, compute,
                                      is_double ? CUDA_R_64F : CUDA_R_32F))) {
    return;
  }
  const cublasLtMatmulDesc_t operation = problem.operation.handle;
  calls.set(operation, CUBLASLT_MATMUL_DESC_TRANSA, p.a.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  calls.set(operation, CUBLASLT_MATMUL_DESC_TRANSB, p.b.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (p.bias_gradient == LtBiasGradient::kNone) return;
  calls.set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
            p.bias_gradient == LtBiasGradient::kOfRows ? CUBLASLT_EPILOGUE_BGRADA
                                                       : CUBLASLT_EPILOGUE_BGRADB);
  calls.set(operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(p.d_type));
  calls.set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
}

Choice choose(cublasLtHandle_t handle, const LtMatmul& p, const Problem& problem,
              std::size_t workspace_bytes, Calls& calls) {
  Preference preference;
  if (!calls(cublasLtMatmulPreferenceCreate(&preference.handle))) return {};
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
  // Parts of a sum are added in the compute type, never in a narrow product's own.
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.a.data));
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.b.data));
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.d));
  calls.set(preference.handle, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.d));
  if (calls.status() != CUBLAS_STATUS_SUCCESS) return {};
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, problem.operation.handle, problem.a.handle, problem.b.handle, problem.d.handle,
      problem.d.handle, preference.handle, 1, &result, &found);
  return {status == CUBLAS_STATUS_SUCCESS && found > 0, result.algo};
}

}  // namespace

std::size_t lt_workspace_bytes(int compute_capability_major) {
  // cuBLAS's own defaults: 32 MiB from Hopper on, 4 MiB before.
  return compute_capability_major >= 9 ? std::size_t{32} << 20 : std::size_t{4} << 20;
}

cublasStatus_t lt_matmul(cublasLtHandle_t handle, const LtMatmul& product, int device,
                         void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  static ChoiceCache cache;
  Calls calls;
  Problem problem;
  describe(product, problem, calls);
  if (calls.status() != CUBLAS_STATUS_SUCCESS) return calls.status();
  const Key key = key_of(product, device, workspace_bytes);
  Choice choice;
  if (!cache.find(key, choice)) {
    choice = choose(handle, product, problem, workspace_bytes, calls);
    if (calls.status() != CUBLAS_STATUS_SUCCESS) return calls.status();
    cache.put(key, choice);
  }
  if (!choice.found) return CUBLAS_STATUS_NOT_SUPPORTED;
  const float float_scalars[2] = {1.0f, static_cast<float>(product.beta)};
  const double double_scalars[2] = {1.0, product.beta};
  const bool is_double = product.type == ScalarType::kFloat64;
  const void* const alpha = is_double ? static_cast<const void*>(double_scalars) : float_scalars;
  const void* const beta =
      is_double ? static_cast<const void*>(double_scalars + 1) : float_scalars + 1;
  return cublasLtMatmul(handle, problem.operation.handle, alpha, product.a.data, problem.a.handle,
                        product.b.data, problem.b.handle, beta, product.d, problem.d.handle,
                        product.d, problem.d.handle, &choice.algorithm, workspace, workspace_bytes,
                        stream);
}

}  // namespace torch_ext::cuda
