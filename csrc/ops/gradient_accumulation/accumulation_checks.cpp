#include <c10/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

#include "../tensor_storage.h"
#include "accumulation_arguments.h"

namespace torch_ext {
namespace {

bool is_floating(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return true;
    default:
      return false;
  }
}

constexpr std::size_t kNoIndex = static_cast<std::size_t>(-1);

std::string argument(const char* name, std::size_t index) {
  return index == kNoIndex ? std::string(name)
                           : std::string(name) + "[" + std::to_string(index) + "]";
}

void check_kind(const char* op, const char* name, std::size_t index, const at::Tensor& tensor) {
  if (tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_nested() &&
      is_floating(tensor) && has_readable_memory(tensor)) {
    return;
  }
  const std::string place = argument(name, index);
  TORCH_CHECK(tensor.defined(), "torch_ext::", op, ": ", place, " takes a tensor, got none");
  TORCH_CHECK(!tensor.is_nested(), "torch_ext::", op, ": ", place,
              " takes a dense tensor; nested tensors are not supported");
  TORCH_CHECK(tensor.layout() == at::kStrided, "torch_ext::", op, ": ", place,
              " takes a dense tensor; sparse tensors are not supported, got layout ",
              tensor.layout());
  TORCH_CHECK(!tensor.is_quantized(), "torch_ext::", op, ": ", place,
              " takes a floating tensor; quantized tensors are not supported");
  TORCH_CHECK(!tensor.is_complex(), "torch_ext::", op, ": ", place,
              " takes a real tensor; complex tensors are not supported, got ",
              tensor.scalar_type());
  TORCH_CHECK(is_floating(tensor), "torch_ext::", op, ": ", place,
              " takes Float, Double, BFloat16 or Half, got ", tensor.scalar_type());
  check_readable(op, place, tensor);
}

void check_device(const char* op, const char* name, std::size_t index, const at::Tensor& tensor,
                  c10::Device device) {
  TORCH_CHECK(tensor.device() == device, "torch_ext::", op, ": ", argument(name, index),
              " takes a tensor on ", device, " like the others, got one on ", tensor.device());
}

void check_like(const char* op, const char* name, std::size_t index, const at::Tensor& tensor,
                const char* like_name, const at::Tensor& like) {
  check_kind(op, name, index, tensor);
  check_device(op, name, index, tensor, like.device());
  TORCH_CHECK(tensor.sym_sizes() == like.sym_sizes(), "torch_ext::", op, ": ",
              argument(name, index), " takes the sizes of ", argument(like_name, index), ", ",
              like.sym_sizes(), ", got ", tensor.sym_sizes());
}

void check_length(const char* op, const char* name, std::size_t length, const char* like_name,
                  std::size_t like) {
  TORCH_CHECK(length == like, "torch_ext::", op, ": ", name, " takes as many entries as ",
              like_name, ", ", like, ", got ", length);
}

/// Lists of one length, the first of which sets the device; entries of one shape.
void check_same_lists(const char* op, c10::ArrayRef<NamedList> lists) {
  const NamedList& first = lists[0];
  for (const NamedList& list : lists) {
    check_length(op, list.name, list.tensors.size(), first.name, first.tensors.size());
  }
  for (std::size_t i = 0; i < first.tensors.size(); ++i) {
    check_kind(op, first.name, i, first.tensors[i]);
    check_device(op, first.name, i, first.tensors[i], first.tensors[0].device());
    for (const NamedList& list : lists.slice(1)) {
      check_like(op, list.name, i, list.tensors[i], first.name, first.tensors[i]);
    }
  }
}

void check_scalar(const char* op, const char* name, const at::Tensor* tensor,
                  at::TensorList device_of) {
  if (tensor == nullptr) return;
  check_kind(op, name, kNoIndex, *tensor);
  TORCH_CHECK(tensor->sym_numel() == 1, "torch_ext::", op, ": ", name,
              " takes a tensor of one element, got sizes ", tensor->sym_sizes());
  if (!device_of.empty()) check_device(op, name, kNoIndex, *tensor, device_of[0].device());
}

void check_no_leaf(const char* op, const char* name, std::size_t index, const at::Tensor& tensor) {
  TORCH_CHECK(!(tensor.requires_grad() && tensor.is_leaf()), "torch_ext::", op, ": ",
              argument(name, index), " takes a buffer, got a leaf that requires grad");
}

void check_no_leaves(const char* op, const char* name, at::TensorList tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i) check_no_leaf(op, name, i, tensors[i]);
}

/// Adds to `destinations` what every optimizer writes.
void check_step(const StepArguments& arguments, std::vector<NamedList>& destinations) {
  const char* op = arguments.op;
  const at::TensorList params = arguments.params;
  check_same_lists(
      op, {NamedList{"params", params}, NamedList{"accumulators", arguments.accumulators}});
  if (!arguments.master_params.empty()) {
    check_length(op, "master_params", arguments.master_params.size(), "params", params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
      check_kind(op, "master_params", i, arguments.master_params[i]);
      const at::Tensor* master = master_of(arguments, i);
      if (master != nullptr) check_like(op, "master_params", i, *master, "params", params[i]);
    }
  }
  check_no_leaves(op, "accumulators", arguments.accumulators);
  check_scalar(op, "lr", arguments.lr, {});
  check_scalar(op, "coefficient", arguments.coefficient, params);
  check_scalar(op, "found_inf", arguments.found_inf, params);
  destinations.push_back({"params", params});
  destinations.push_back({"accumulators", arguments.accumulators});
  destinations.push_back({"master_params", arguments.master_params});
}

/// One list that has the params' shapes.
void check_state(const StepArguments& arguments, const char* name, at::TensorList tensors,
                 std::vector<NamedList>& destinations) {
  check_length(arguments.op, name, tensors.size(), "params", arguments.params.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_like(arguments.op, name, i, tensors[i], "params", arguments.params[i]);
  }
  destinations.push_back({name, tensors});
}

void check_absent(const char* op, const char* name, at::TensorList tensors, const char* unless) {
  TORCH_CHECK(tensors.empty(), "torch_ext::", op, ": ", name, " takes an empty list unless ",
              unless, ", got ", tensors.size(), " entries");
}

void check_step_overlap(const StepArguments& arguments, c10::ArrayRef<NamedList> destinations) {
  std::vector<NamedList> sources;
  const auto add = [&](const char* name, const at::Tensor* tensor) {
    if (tensor != nullptr) sources.push_back({name, at::TensorList(*tensor), false});
  };
  add("lr", arguments.lr);
  add("coefficient", arguments.coefficient);
  add("found_inf", arguments.found_inf);
  check_overlap(arguments.op, destinations, sources);
}

}  // namespace

void check_not_negative(const char* op, const char* name, double value) {
  TORCH_CHECK(value >= 0.0, "torch_ext::", op, ": ", name, " takes a number >= 0, got ", value);
}

void check_accumulate(at::TensorList accumulators, at::TensorList grads, const at::Tensor* scale) {
  constexpr const char* kOp = "grad_accumulate_";
  check_same_lists(kOp, {NamedList{"accumulators", accumulators}, NamedList{"grads", grads}});
  check_no_leaves(kOp, "accumulators", accumulators);
  check_scalar(kOp, "scale", scale, accumulators);
  const NamedList destinations[] = {{"accumulators", accumulators}};
  const NamedList sources[] = {
      {"grads", grads, true, true},
      {"scale", scale == nullptr ? at::TensorList() : at::TensorList(*scale), false}};
  check_overlap(kOp, destinations, sources);
}

void check_grad_stats(at::TensorList grads) {
  check_same_lists("grad_stats", {NamedList{"grads", grads}});
}

at::ScalarType norm_type(at::TensorList grads) {
  for (const at::Tensor& grad : grads) {
    if (grad.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

void check_weight_gradient(const WeightGradientArguments& arguments) {
  constexpr const char* kOp = "linear_wgrad_";
  const at::Tensor& weight = arguments.weight_grad;
  const at::Tensor& grad = arguments.grad_output;
  const at::Tensor& input = arguments.input;
  check_kind(kOp, "weight_grad", kNoIndex, weight);
  check_kind(kOp, "grad_output", kNoIndex, grad);
  check_kind(kOp, "input", kNoIndex, input);
  check_device(kOp, "grad_output", kNoIndex, grad, weight.device());
  check_device(kOp, "input", kNoIndex, input, weight.device());
  TORCH_CHECK(weight.dim() == 2, "torch_ext::", kOp,
              ": weight_grad takes the sizes (out_features, in_features), got ",
              weight.sym_sizes());
  TORCH_CHECK(grad.dim() >= 1 && grad.sym_size(-1) == weight.sym_size(0), "torch_ext::", kOp,
              ": grad_output takes the sizes (tokens..., out_features), out_features = ",
              weight.sym_size(0), ", got ", grad.sym_sizes());
  TORCH_CHECK(
      input.dim() == grad.dim() && input.sym_size(-1) == weight.sym_size(1) &&
          input.sym_sizes().slice(0, input.dim() - 1) == grad.sym_sizes().slice(0, grad.dim() - 1),
      "torch_ext::", kOp,
      ": input takes the sizes (tokens..., in_features) with the tokens of grad_output, ",
      grad.sym_sizes(), ", and in_features = ", weight.sym_size(1), ", got ", input.sym_sizes());
  std::vector<NamedList> destinations{{"weight_grad", at::TensorList(weight), false}};
  check_no_leaf(kOp, "weight_grad", kNoIndex, weight);
  if (arguments.bias_grad != nullptr) {
    const at::Tensor& bias = *arguments.bias_grad;
    check_kind(kOp, "bias_grad", kNoIndex, bias);
    check_device(kOp, "bias_grad", kNoIndex, bias, weight.device());
    TORCH_CHECK(bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(0), "torch_ext::", kOp,
                ": bias_grad takes the sizes (out_features), out_features = ", weight.sym_size(0),
                ", got ", bias.sym_sizes());
    check_no_leaf(kOp, "bias_grad", kNoIndex, bias);
    destinations.push_back({"bias_grad", at::TensorList(bias), false});
  }
  const NamedList sources[] = {{"grad_output", at::TensorList(grad), false},
                               {"input", at::TensorList(input), false}};
  check_overlap(kOp, destinations, sources);
}

void check_embedding_gradient(const at::Tensor& weight, const at::Tensor& indices,
                              const at::Tensor& grad) {
  constexpr const char* kOp = "embedding_wgrad_";
  check_kind(kOp, "weight_grad", kNoIndex, weight);
  check_kind(kOp, "grad_output", kNoIndex, grad);
  check_device(kOp, "grad_output", kNoIndex, grad, weight.device());
  TORCH_CHECK(weight.dim() == 2, "torch_ext::", kOp,
              ": weight_grad takes the sizes (num_embeddings, dim), got ", weight.sym_sizes());
  TORCH_CHECK(indices.defined() && indices.layout() == at::kStrided && !indices.is_nested() &&
                  (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt),
              "torch_ext::", kOp, ": indices takes a dense tensor of Long or Int, got ",
              indices.defined() ? c10::toString(indices.scalar_type()) : "none");
  check_readable(kOp, "indices", indices);
  check_device(kOp, "indices", kNoIndex, indices, weight.device());
  TORCH_CHECK(grad.dim() == indices.dim() + 1 && grad.sym_size(-1) == weight.sym_size(1) &&
                  grad.sym_sizes().slice(0, indices.dim()) == indices.sym_sizes(),
              "torch_ext::", kOp, ": grad_output takes the sizes of indices, ", indices.sym_sizes(),
              ", and dim = ", weight.sym_size(1), ", got ", grad.sym_sizes());
  check_no_leaf(kOp, "weight_grad", kNoIndex, weight);
  const NamedList destinations[] = {{"weight_grad", at::TensorList(weight), false}};
  const NamedList sources[] = {{"grad_output", at::TensorList(grad), false},
                               {"indices", at::TensorList(indices), false}};
  check_overlap(kOp, destinations, sources);
}

void check_adam(const AdamArguments& arguments) {
  const StepArguments& step = arguments.step;
  std::vector<NamedList> destinations;
  check_step(step, destinations);
  check_state(step, "exp_avgs", arguments.exp_avgs, destinations);
  check_state(step, "exp_avg_sqs", arguments.exp_avg_sqs, destinations);
  if (arguments.amsgrad) {
    check_state(step, "max_exp_avg_sqs", arguments.max_exp_avg_sqs, destinations);
  } else {
    check_absent(step.op, "max_exp_avg_sqs", arguments.max_exp_avg_sqs, "amsgrad=True");
  }
  check_length(step.op, "steps", arguments.steps.size(), "params", step.params.size());
  for (std::size_t i = 0; i < arguments.steps.size(); ++i) {
    const at::Tensor& count = arguments.steps[i];
    check_kind(step.op, "steps", i, count);
    check_device(step.op, "steps", i, count, step.params[0].device());
    TORCH_CHECK(count.sym_numel() == 1 &&
                    (count.scalar_type() == at::kFloat || count.scalar_type() == at::kDouble),
                "torch_ext::", step.op, ": steps[", i,
                "] takes a Float or Double tensor of one element, got ", count.scalar_type(),
                " with sizes ", count.sym_sizes());
  }
  destinations.push_back({"steps", arguments.steps});
  for (const auto& [name, beta] :
       {std::pair{"beta1", arguments.beta1}, {"beta2", arguments.beta2}}) {
    TORCH_CHECK(beta >= 0.0 && beta < 1.0, "torch_ext::", step.op, ": ", name,
                " takes a number in [0, 1), got ", beta);
  }
  check_not_negative(step.op, "eps", arguments.eps);
  check_not_negative(step.op, "weight_decay", arguments.weight_decay);
  check_step_overlap(step, destinations);
}

void check_sgd(const SgdArguments& arguments) {
  const StepArguments& step = arguments.step;
  std::vector<NamedList> destinations;
  check_step(step, destinations);
  check_not_negative(step.op, "momentum", arguments.momentum);
  check_not_negative(step.op, "weight_decay", arguments.weight_decay);
  if (arguments.momentum != 0.0) {
    check_state(step, "momentum_buffers", arguments.momentum_buffers, destinations);
  } else {
    check_absent(step.op, "momentum_buffers", arguments.momentum_buffers, "momentum > 0");
  }
  TORCH_CHECK(!arguments.nesterov || (arguments.momentum > 0.0 && arguments.dampening == 0.0),
              "torch_ext::", step.op,
              ": nesterov takes momentum > 0 and dampening = 0, got momentum ", arguments.momentum,
              " and dampening ", arguments.dampening);
  if (arguments.first_steps != 0) {
    check_length(step.op, "first_step", arguments.first_steps, "params", step.params.size());
  }
  check_step_overlap(step, destinations);
}

}  // namespace torch_ext
