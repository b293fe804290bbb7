// The C++ signatures of the mini-batch operators, as the dispatcher sees them, and which of their
// arguments they write.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "accumulation_arguments.h"

namespace torch_ext {

/// Argument positions as bits.
template <typename... Positions>
constexpr std::uint32_t written(Positions... positions) {
  return ((std::uint32_t{1} << positions) | ... | 0u);
}

struct GradAccumulate {
  static constexpr const char* kName = "grad_accumulate_";
  static constexpr const char* kOverload = "";
  static constexpr std::uint32_t kWritten = written(0);
  using Signature = void(at::TensorList, at::TensorList, double, const OptionalTensor&);
};

struct LinearWgrad {
  static constexpr const char* kName = "linear_wgrad_";
  static constexpr const char* kOverload = "";
  static constexpr std::uint32_t kWritten = written(0, 1);
  using Signature = void(const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                         const at::Tensor&, double);
};

struct EmbeddingWgrad {
  static constexpr const char* kName = "embedding_wgrad_";
  static constexpr const char* kOverload = "";
  static constexpr std::uint32_t kWritten = written(0);
  using Signature = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, std::int64_t,
                         bool, double);
};

template <typename Lr>
struct AdamwStep {
  static constexpr const char* kName = "adamw_step_";
  static constexpr const char* kOverload = std::is_same_v<Lr, double> ? "" : "tensor_lr";
  static constexpr std::uint32_t kWritten = written(0, 1, 2, 3, 4, 5, 6);
  using Signature = void(at::TensorList params, at::TensorList accumulators,
                         at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                         at::TensorList max_exp_avg_sqs, at::TensorList master_params,
                         at::TensorList steps, Lr lr, double beta1, double beta2, double eps,
                         double weight_decay, bool decoupled, bool amsgrad, bool maximize,
                         const OptionalTensor& coefficient, const OptionalTensor& found_inf,
                         bool reset);
};

template <typename Lr>
struct SgdStep {
  static constexpr const char* kName = "sgd_step_";
  static constexpr const char* kOverload = std::is_same_v<Lr, double> ? "" : "tensor_lr";
  static constexpr std::uint32_t kWritten = written(0, 1, 2, 3);
  using Signature = void(at::TensorList params, at::TensorList accumulators,
                         at::TensorList momentum_buffers, at::TensorList master_params, Lr lr,
                         double momentum, double dampening, double weight_decay, bool nesterov,
                         bool maximize, c10::List<bool> first_step,
                         const OptionalTensor& coefficient, const OptionalTensor& found_inf,
                         bool reset);
};

/// norm, norms, found_inf
using GradStatsResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

}  // namespace torch_ext
