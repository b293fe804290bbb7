#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>
#include <utility>
#include <vector>

#include "gradient_accumulator_calls.h"
#include "gradient_accumulator_layers.h"
#include "gradient_accumulator_leaf.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// (tokens..., features) as (tokens, features)
at::Tensor flatten_tokens(const at::Tensor& tensor) {
  return tensor.reshape({-1, tensor.size(-1)});
}

struct Indices {
  std::size_t weight;
  std::int64_t bias;  // negative: not one of the core's
};

struct LinearGradients {
  at::Tensor weight;
  at::Tensor bias;
};

/// As gradients that travel through autograd, differentiable where a graph is built.
LinearGradients plain_gradients(const at::Tensor& grad, const at::Tensor& input,
                                at::ScalarType dtype, bool needs_weight, bool needs_bias) {
  LinearGradients result;
  const at::Tensor grads = flatten_tokens(grad);
  if (needs_weight) result.weight = at::mm(grads.t(), flatten_tokens(input)).to(dtype);
  if (needs_bias) result.bias = grads.sum(0).to(dtype);
  return result;
}

void add_bias(AccumulatorCore& core, std::size_t index, const at::Tensor& grad) {
  const auto bias = core.claim(index);
  const at::Tensor sum = flatten_tokens(grad).sum(0, /*keepdim=*/false, bias.sum.scalar_type());
  call_operator<GradAccumulate>(at::TensorList(bias.sum), at::TensorList(sum), bias.beta,
                                OptionalTensor());
}

/// Both sums in one pass over grad.
void add_to_sums(AccumulatorCore& core, Indices indices, bool with_bias, const at::Tensor& grad,
                 const at::Tensor& input) {
  const std::lock_guard<std::mutex> lock(core.kernel_mutex());
  const auto bias_index = static_cast<std::size_t>(indices.bias);
  const bool together = with_bias && core.is_written(bias_index) == core.is_written(indices.weight);
  const auto weight = core.claim(indices.weight);
  OptionalTensor bias_sum;
  if (together) bias_sum = core.claim(bias_index).sum;
  call_operator<LinearWgrad>(weight.sum, bias_sum, grad, input, weight.beta);
  if (with_bias && !together) add_bias(core, bias_index, grad);
}

/// The values of `copy` with the history of `weight`, for a backward that builds a graph.
struct CopyOfWeight : torch::autograd::Function<CopyOfWeight> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& copy,
                            const at::Tensor& weight) {
    context->saved_data["dtype"] = static_cast<std::int64_t>(weight.scalar_type());
    return copy.alias();
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto dtype = static_cast<at::ScalarType>(context->saved_data["dtype"].toInt());
    return {at::Tensor(), grads[0].defined() ? grads[0].to(dtype) : at::Tensor()};
  }
};

struct AccumulatingLinear : torch::autograd::Function<AccumulatingLinear> {
  // operand_weight, operand_bias: without history; autocast's copies, or the parameters themselves.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const OptionalTensor& bias,
                            const at::Tensor& operand_weight, const OptionalTensor& operand_bias,
                            const c10::intrusive_ptr<AccumulatorCore>& core,
                            std::int64_t weight_index, std::int64_t bias_index) {
    context->set_materialize_grads(false);
    // As torch's own linear saves them, in its order: a checkpoint may compute again what was
    // torch's own before, and a weight that no gradient needs may be written before backward.
    variable_list saved{context->needs_input_grad(1) ? input : at::Tensor(),
                        context->needs_input_grad(0) ? operand_weight.t() : at::Tensor()};
    if (!bias.has_value()) std::swap(saved[0], saved[1]);
    context->save_for_backward(std::move(saved));
    context->saved_data["core"] = core;
    context->saved_data["weight_index"] = weight_index;
    context->saved_data["bias_index"] = bias_index;
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["is_copy"] = !operand_weight.is_alias_of(weight);
    return at::linear(input, operand_weight, operand_bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(8);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    variable_list saved = context->get_saved_variables();
    const bool has_bias = context->saved_data["has_bias"].toBool();
    if (!has_bias) std::swap(saved[0], saved[1]);
    const auto core = context->saved_data["core"].toCustomClass<AccumulatorCore>();
    const Indices indices{static_cast<std::size_t>(context->saved_data["weight_index"].toInt()),
                          context->saved_data["bias_index"].toInt()};
    const at::Tensor& weight = core->param(indices.weight);
    const bool needs_weight = context->needs_input_grad(1);
    bool needs_bias = has_bias && context->needs_input_grad(2);
    if (context->needs_input_grad(0)) {
      at::Tensor operand = saved[1].t();
      if (at::GradMode::is_enabled()) {
        operand =
            context->saved_data["is_copy"].toBool() ? CopyOfWeight::apply(operand, weight) : weight;
      }
      result[0] = at::matmul(grad, operand);
    }
    bool plain_weight = needs_weight;
    if (needs_weight && core->is_open() &&
        may_bypass_autograd(weight, core->ignores_node_hooks())) {
      const bool with_bias =
          needs_bias && indices.bias >= 0 &&
          may_bypass_autograd(core->param(static_cast<std::size_t>(indices.bias)),
                              core->ignores_node_hooks());
      add_to_sums(*core, indices, with_bias, grad, saved[0]);
      plain_weight = false;
      needs_bias = needs_bias && !with_bias;
    }
    if (plain_weight || needs_bias) {
      LinearGradients plain =
          plain_gradients(grad, saved[0], weight.scalar_type(), plain_weight, needs_bias);
      result[1] = std::move(plain.weight);
      result[2] = std::move(plain.bias);
    }
    return result;
  }
};

/// As autocast casts an operand: float64 and other devices' tensors stay.
at::Tensor autocast_operand(const at::Tensor& tensor, at::ScalarType dtype,
                            c10::DeviceType device) {
  const bool casts = tensor.is_floating_point() && tensor.scalar_type() != at::kDouble &&
                     tensor.device().type() == device;
  return casts ? tensor.to(dtype) : tensor;
}

}  // namespace

at::Tensor accumulating_linear(const c10::intrusive_ptr<AccumulatorCore>& core,
                               const at::Tensor& input, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, std::int64_t weight_index,
                               std::int64_t bias_index) {
  const c10::DeviceType device = weight.device().type();
  OptionalTensor operand_bias;
  if (bias.has_value()) operand_bias = bias->detach();
  // Tokens in one dimension, where torch's own linear does so.
  const auto apply = [&](const at::Tensor& operand_input, const at::Tensor& operand_weight) {
    const std::int64_t dims = operand_input.dim();
    const bool flattens = dims != 2 && operand_input.numel() != 0 &&
                          (bias.has_value() ? operand_input.is_contiguous() : dims > 2);
    const at::Tensor output = AccumulatingLinear::apply(
        flattens ? flatten_tokens(operand_input) : operand_input, weight, bias, operand_weight,
        operand_bias, core, weight_index, bias_index);
    if (!flattens) return output;
    std::vector<std::int64_t> sizes = operand_input.sizes().vec();
    sizes.back() = output.size(-1);
    return output.view(sizes);
  };
  if (!at::autocast::is_autocast_enabled(device)) return apply(input, weight.detach());
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::Tensor operand_weight =
      weight.scalar_type() == at::kDouble
          ? weight.detach()
          : core->autocast_copies().copy(static_cast<std::size_t>(weight_index), weight, dtype);
  if (bias.has_value()) operand_bias = autocast_operand(*operand_bias, dtype, device);
  return apply(autocast_operand(input, dtype, device), operand_weight);
}

}  // namespace torch_ext
