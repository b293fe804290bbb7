// AdamW, Adam and SGD of one element: torch.optim's numbers with fused=True, to rounding.
#pragma once

#include <cmath>
#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"

namespace torch_ext::cuda {

// Operands of an entry in the order of its StridedLoop.
enum AdamOperand {
  kAdamParam,
  kAdamGrad,
  kAdamExpAvg,
  kAdamExpAvgSq,
  kAdamMax,
  kAdamMaster,
  kAdamOperands
};
enum SgdOperand { kSgdParam, kSgdGrad, kSgdMomentum, kSgdMaster, kSgdOperands };

/// What of an Adam entry hangs on its step count: worked out once an entry, on the device.
struct AdamCorrections {
  double decay;  // decoupled: the parameter's factor; else what is added to the gradient
  double negative_step_size;
  double inverse_bias_correction2_sqrt;
};

struct AdamSettings {
  double beta1;
  double beta2;
  double eps;
  bool decoupled;
  bool amsgrad;
};

TORCH_EXT_DEVICE AdamCorrections adam_corrections(const AdamSettings& settings, double step,
                                                  double lr, double weight_decay) {
  return {settings.decoupled ? 1.0 - lr * weight_decay : weight_decay,
          -lr / (1.0 - pow(settings.beta1, step)), 1.0 / sqrt(1.0 - pow(settings.beta2, step))};
}

template <typename T>
struct AdamArithmetic {
  static constexpr int kOperands = kAdamOperands;
  static constexpr int kParam = kAdamParam;
  static constexpr int kGrad = kAdamGrad;
  static constexpr int kMaster = kAdamMaster;

  T coefficient;  // negative to maximize
  T decay;
  T average_weight;
  T square_decay;
  T square_weight;
  T inverse_bias_correction2_sqrt;
  T eps;
  T negative_step_size;
  bool decoupled;
  bool amsgrad;

  TORCH_EXT_DEVICE static AdamArithmetic make(const AdamSettings& settings,
                                              const AdamCorrections& corrections,
                                              double coefficient) {
    return {static_cast<T>(coefficient),
            static_cast<T>(corrections.decay),
            static_cast<T>(1.0 - settings.beta1),
            static_cast<T>(settings.beta2),
            static_cast<T>(1.0 - settings.beta2),
            static_cast<T>(corrections.inverse_bias_correction2_sqrt),
            static_cast<T>(settings.eps),
            static_cast<T>(corrections.negative_step_size),
            settings.decoupled,
            settings.amsgrad};
  }

  /// `values` by AdamOperand; `weight` is the master's value, or the parameter's.
  TORCH_EXT_DEVICE void step(T (&values)[kAdamOperands], T& weight) const {
    T grad = values[kAdamGrad] * coefficient;
    if (decoupled) {
      weight *= decay;
    } else {
      grad += weight * decay;
    }
    // torch's lerp: from the nearer end.
    const T difference = grad - values[kAdamExpAvg];
    const T average = average_weight < T(0.5) ? values[kAdamExpAvg] + average_weight * difference
                                              : grad + (average_weight - T(1)) * difference;
    const T square = values[kAdamExpAvgSq] * square_decay + square_weight * grad * grad;
    values[kAdamExpAvg] = average;
    values[kAdamExpAvgSq] = square;
    T largest = square;
    if (amsgrad) {
      const T before = values[kAdamMax];
      largest = before > square || before != before ? before : square;
      values[kAdamMax] = largest;
    }
    weight += negative_step_size * average / (sqrt(largest) * inverse_bias_correction2_sqrt + eps);
  }

  /// Whether an operand is read; `flag` is the entry's.
  TORCH_EXT_DEVICE static bool reads(int, bool) { return true; }
};

struct SgdSettings {
  double weight_decay;
  double momentum;
  double dampening;
  bool nesterov;
};

template <typename T>
struct SgdArithmetic {
  static constexpr int kOperands = kSgdOperands;
  static constexpr int kParam = kSgdParam;
  static constexpr int kGrad = kSgdGrad;
  static constexpr int kMaster = kSgdMaster;

  T coefficient;
  T weight_decay;
  T momentum;
  T grad_weight;
  T negative_lr;
  bool decays;
  bool has_buffer;
  bool nesterov;
  bool first_step;

  TORCH_EXT_DEVICE static SgdArithmetic make(const SgdSettings& settings, double lr,
                                             double coefficient, bool has_buffer, bool first_step) {
    return {static_cast<T>(coefficient),
            static_cast<T>(settings.weight_decay),
            static_cast<T>(settings.momentum),
            static_cast<T>(1.0 - settings.dampening),
            static_cast<T>(-lr),
            settings.weight_decay != 0.0,
            has_buffer,
            settings.nesterov,
            first_step};
  }

  TORCH_EXT_DEVICE void step(T (&values)[kSgdOperands], T& weight) const {
    T grad = values[kSgdGrad] * coefficient;
    if (decays) grad += weight * weight_decay;
    if (has_buffer) {
      const T buffer = first_step ? grad : values[kSgdMomentum] * momentum + grad * grad_weight;
      values[kSgdMomentum] = buffer;
      grad = nesterov ? grad + buffer * momentum : buffer;
    }
    weight += grad * negative_lr;
  }

  TORCH_EXT_DEVICE static bool reads(int operand, bool first_step) {
    return !(operand == kSgdMomentum && first_step);
  }
};

}  // namespace torch_ext::cuda
