#include "accumulation_reference.h"

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "element_access.h"

namespace torch_ext {
namespace {

using reference::load_element;
using reference::store_element;

/// Offset of the element that is `index`-th in the loop's order, in operand `operand`.
std::int64_t offset_of(const StridedLoop& loop, std::int64_t index, int operand) {
  if (loop.dims == 0) return index;
  std::int64_t offset = 0;
  for (int dim = loop.dims - 1; dim >= 0; --dim) {
    offset += index % loop.sizes[dim] * loop.strides[operand * loop.dims + dim];
    index /= loop.sizes[dim];
  }
  return offset;
}

double scalar(const ConstOperand& operand, double otherwise) {
  return operand.data == nullptr ? otherwise : load_element(operand.data, 0, operand.type);
}

/// sqrt(a^2 + b^2): no square overflows or vanishes. NaN wins over infinity.
double hypotenuse(double a, double b) {
  return std::isnan(a) || std::isnan(b) ? a + b : std::hypot(a, b);
}

struct Element {
  Operand operand;
  std::int64_t offset;
  double get() const { return load_element(operand.data, offset, operand.type); }
  void set(double value) const { store_element(operand.data, offset, operand.type, value); }
};

}  // namespace

void accumulate_reference(const AccumulateParams& params) {
  const double scale = scalar(params.scale, 1.0);
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    const AccumulateEntry& entry = params.entries[i];
    for (std::int64_t index = 0; index < entry.count; ++index) {
      const Element accumulator{entry.accumulator, offset_of(entry.loop, index, 0)};
      double sum =
          scale * load_element(entry.grad.data, offset_of(entry.loop, index, 1), entry.grad.type);
      if (params.beta != 0.0) sum += params.beta * accumulator.get();
      accumulator.set(sum);
    }
  }
}

void grad_stats_reference(const GradStatsParams& params) {
  double total = 0.0;  // norm of all so far
  bool finite = true;
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    const GradStatsEntry& entry = params.entries[i];
    double norm = 0.0;
    for (std::int64_t index = 0; index < entry.count; ++index) {
      const double x =
          load_element(entry.grad.data, offset_of(entry.loop, index, 0), entry.grad.type);
      finite = finite && std::isfinite(x);
      norm = hypotenuse(norm, x);
    }
    total = hypotenuse(total, norm);
    store_element(params.norms, i, params.norm_type, norm);
  }
  store_element(params.norm, 0, params.norm_type, total);
  *params.found_inf = finite ? 0.0f : 1.0f;
}

namespace {

/// A master counts as long as the param is its rounding; else somebody else has written the param.
double weight_of(const Element& param, const Element& master) {
  if (master.operand.data == nullptr) return param.get();
  double rounded[1];
  store_element(rounded, 0, param.operand.type, master.get());
  return load_element(rounded, 0, param.operand.type) == param.get() ? master.get() : param.get();
}

}  // namespace

void adam_step_reference(const AdamParams& params) {
  const OptimizerSettings& settings = params.settings;
  const bool skipped = scalar(settings.found_inf, 0.0) != 0.0;
  const double coefficient = scalar(settings.coefficient, 1.0) * (settings.maximize ? -1.0 : 1.0);
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    const AdamEntry& entry = params.entries[i];
    const Element step{entry.step, 0};
    if (!skipped) step.set(step.get() + 1.0);
    const double correction1 = 1.0 - std::pow(params.beta1, step.get());
    const double correction2 = 1.0 - std::pow(params.beta2, step.get());
    for (std::int64_t index = 0; index < entry.count; ++index) {
      const auto at = [&](const Operand& operand, int place) {
        return Element{operand, offset_of(entry.loop, index, place)};
      };
      const Element param = at(entry.param, 0);
      const Element accumulator = at(entry.accumulator, 1);
      const Element exp_avg = at(entry.exp_avg, 2);
      const Element exp_avg_sq = at(entry.exp_avg_sq, 3);
      const Element max_exp_avg_sq = at(entry.max_exp_avg_sq, 4);
      const Element master = at(entry.master, 5);
      if (!skipped) {
        double weight = weight_of(param, master);
        double grad = coefficient * accumulator.get();
        if (params.decoupled) {
          weight *= 1.0 - settings.lr * settings.weight_decay;
        } else if (settings.weight_decay != 0.0) {
          grad += settings.weight_decay * weight;
        }
        const double average = params.beta1 * exp_avg.get() + (1.0 - params.beta1) * grad;
        const double square = params.beta2 * exp_avg_sq.get() + (1.0 - params.beta2) * grad * grad;
        exp_avg.set(average);
        exp_avg_sq.set(square);
        double largest = square;
        if (params.amsgrad) {
          const double before = max_exp_avg_sq.get();
          largest = before > square || std::isnan(before) ? before : square;
          max_exp_avg_sq.set(largest);
        }
        const double denominator = std::sqrt(largest) / std::sqrt(correction2) + params.eps;
        weight -= settings.lr / correction1 * average / denominator;
        if (entry.master.data != nullptr) master.set(weight);
        param.set(weight);
      }
      if (settings.reset) accumulator.set(0.0);
    }
  }
}

void sgd_step_reference(const SgdParams& params) {
  const OptimizerSettings& settings = params.settings;
  const bool skipped = scalar(settings.found_inf, 0.0) != 0.0;
  const double coefficient = scalar(settings.coefficient, 1.0) * (settings.maximize ? -1.0 : 1.0);
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    const SgdEntry& entry = params.entries[i];
    for (std::int64_t index = 0; index < entry.count; ++index) {
      const auto at = [&](const Operand& operand, int place) {
        return Element{operand, offset_of(entry.loop, index, place)};
      };
      const Element param = at(entry.param, 0);
      const Element accumulator = at(entry.accumulator, 1);
      const Element momentum_buffer = at(entry.momentum_buffer, 2);
      const Element master = at(entry.master, 3);
      if (!skipped) {
        double weight = weight_of(param, master);
        double grad = coefficient * accumulator.get();
        if (settings.weight_decay != 0.0) grad += settings.weight_decay * weight;
        if (entry.momentum_buffer.data != nullptr) {
          const double buffer = entry.first_step ? grad
                                                 : params.momentum * momentum_buffer.get() +
                                                       (1.0 - params.dampening) * grad;
          momentum_buffer.set(buffer);
          grad = params.nesterov ? grad + params.momentum * buffer : buffer;
        }
        weight -= settings.lr * grad;
        if (entry.master.data != nullptr) master.set(weight);
        param.set(weight);
      }
      if (settings.reset) accumulator.set(0.0);
    }
  }
}

void weight_gradient_reference(const WeightGradientParams& params) {
  const Matrix& weight = params.weight_grad;
  const ConstMatrix& grads = params.grad_output;
  const ConstMatrix& inputs = params.input;
  for (std::int64_t i = 0; i < params.out_features; ++i) {
    const auto grad = [&](std::int64_t token) {
      return load_element(grads.data, token * grads.row_stride + i * grads.col_stride, grads.type);
    };
    for (std::int64_t j = 0; j < params.in_features; ++j) {
      double sum = 0.0;
      for (std::int64_t token = 0; token < params.tokens; ++token) {
        sum += grad(token) * load_element(inputs.data,
                                          token * inputs.row_stride + j * inputs.col_stride,
                                          inputs.type);
      }
      const Element target{{weight.data, weight.type},
                           i * weight.row_stride + j * weight.col_stride};
      if (params.beta != 0.0) sum += params.beta * target.get();
      target.set(sum);
    }
    if (params.bias_grad.data == nullptr) continue;
    double sum = 0.0;
    for (std::int64_t token = 0; token < params.tokens; ++token) sum += grad(token);
    const Element target{params.bias_grad, i * params.bias_stride};
    if (params.beta != 0.0) sum += params.beta * target.get();
    target.set(sum);
  }
}

void embedding_gradient_reference(const EmbeddingGradientParams& params) {
  const Matrix& weight = params.weight_grad;
  const ConstMatrix& grads = params.grad_output;
  std::int64_t index = 0;
  for (std::int64_t row = 0; row < params.num_embeddings; ++row) {
    const bool named = index < params.num_rows && params.rows[index] == row;
    const std::int64_t begin = named ? params.starts[index] : 0;
    const std::int64_t end = named ? params.starts[index + 1] : 0;
    if (named) ++index;
    for (std::int64_t col = 0; col < params.dim; ++col) {
      double sum = 0.0;
      for (std::int64_t i = begin; i < end; ++i) {
        sum += load_element(grads.data,
                            params.positions[i] * grads.row_stride + col * grads.col_stride,
                            grads.type);
      }
      if (named && params.scale_by_frequency) sum /= static_cast<double>(end - begin);
      const Element target{{weight.data, weight.type},
                           row * weight.row_stride + col * weight.col_stride};
      if (params.beta != 0.0) sum += params.beta * target.get();
      target.set(sum);
    }
  }
}

}  // namespace torch_ext
