// The core as torch.classes.torch_ext.AccumulatorCore, for the Python front: a TorchScript class,
// so that nothing of Python is linked.
#include <torch/custom_class.h>

#include <tuple>
#include <utility>

#include "gradient_accumulator_core.h"
#include "gradient_accumulator_layers.h"
#include "shared_memory.h"

namespace torch_ext {
namespace {

using CorePtr = c10::intrusive_ptr<AccumulatorCore>;
using Numbers = std::vector<std::int64_t>;
using Tensors = std::vector<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kClass = "torch_ext::AccumulatorCore: ";

std::size_t index_of(const CorePtr& core, std::int64_t number) {
  TORCH_CHECK(number >= 0 && number < static_cast<std::int64_t>(core->size()), kClass,
              "an index takes a number from 0 to ", core->size() - 1, ", got ", number);
  return static_cast<std::size_t>(number);
}

std::vector<std::size_t> indices_of(const CorePtr& core, const Numbers& numbers) {
  std::vector<std::size_t> indices;
  indices.reserve(numbers.size());
  for (const std::int64_t number : numbers) indices.push_back(index_of(core, number));
  return indices;
}

/// Parameters that have a sum.
std::vector<std::size_t> written_indices_of(const CorePtr& core, const Numbers& numbers) {
  std::vector<std::size_t> indices = indices_of(core, numbers);
  for (const std::size_t index : indices) {
    TORCH_CHECK(core->is_written(index), kClass, "an index takes a parameter that has a sum, got ",
                index, ", ", core->name(index), ", which has none");
  }
  return indices;
}

/// As many gradients as indices, no index twice.
std::vector<std::size_t> indices_of_grads(const CorePtr& core, const Numbers& numbers,
                                          const Tensors& grads) {
  TORCH_CHECK(grads.size() == numbers.size(), kClass, "grads takes one tensor for each index, ",
              numbers.size(), ", got ", grads.size());
  std::vector<std::size_t> indices = indices_of(core, numbers);
  std::vector<bool> seen(core->size());
  for (std::size_t k = 0; k < indices.size(); ++k) {
    TORCH_CHECK(grads[k].defined(), kClass, "grads takes tensors, got none at ", k);
    TORCH_CHECK(!seen[indices[k]], kClass, "indices takes each index once, got ", indices[k],
                " twice");
    seen[indices[k]] = true;
  }
  return indices;
}

void check_place(const CorePtr& core, const at::Tensor& weight, std::int64_t weight_index) {
  const at::Tensor& param = core->param(index_of(core, weight_index));
  TORCH_CHECK(weight.is_same(param), kClass, "weight_index takes the place of weight, got ",
              weight_index);
}

at::Tensor linear(const CorePtr& core, const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, std::int64_t weight_index,
                  std::int64_t bias_index) {
  check_place(core, weight, weight_index);
  if (bias_index >= 0) check_place(core, bias.value_or(at::Tensor()), bias_index);
  return accumulating_linear(core, input, weight, bias, weight_index, bias_index);
}

at::Tensor embedding(const CorePtr& core, const at::Tensor& indices, const at::Tensor& weight,
                     std::int64_t padding_idx, bool scale_grad_by_freq, std::int64_t weight_index) {
  check_place(core, weight, weight_index);
  return accumulating_embedding(core, indices, weight, padding_idx, scale_grad_by_freq,
                                weight_index);
}

Numbers numbers_of(const std::vector<std::size_t>& indices) {
  return {indices.begin(), indices.end()};
}

Weight weight_of(double number, const std::optional<at::Tensor>& tensor) {
  return {number, tensor.value_or(at::Tensor())};
}

CorePtr make_core(Tensors params, std::vector<std::string> names, std::int64_t dtype,
                  bool takes_grads) {
  return c10::make_intrusive<AccumulatorCore>(std::move(params), std::move(names),
                                              static_cast<at::ScalarType>(dtype), takes_grads);
}

ThreeTensors prepare_step(const CorePtr& core, double multiplier,
                          const std::optional<at::Tensor>& inverse_scale,
                          std::optional<double> max_norm) {
  StepScale scale = core->written().empty() ? core->nothing()
                                            : core->normalise(core->measure(), core->weight(),
                                                              core->first_micro_batch(), multiplier,
                                                              inverse_scale, max_norm);
  return {std::move(scale.norm), std::move(scale.coefficient), std::move(scale.found_inf)};
}

ThreeTensors normalise(const CorePtr& core, const at::Tensor& norm, const at::Tensor& found_inf,
                       const at::Tensor& weight, const at::Tensor& first_micro_batch,
                       double multiplier, const std::optional<at::Tensor>& inverse_scale,
                       std::optional<double> max_norm) {
  StepScale scale = core->normalise({norm, found_inf}, weight, first_micro_batch, multiplier,
                                    inverse_scale, max_norm);
  return {std::move(scale.norm), std::move(scale.coefficient), std::move(scale.found_inf)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.class_<AccumulatorCore>("AccumulatorCore")
      .def(torch::init(&make_core))
      .def("open", &AccumulatorCore::open)
      .def("is_open_with",
           [](const CorePtr& core, std::int64_t ticket) { return core->is_open(ticket); })
      .def("abort_with", [](const CorePtr& core, std::int64_t ticket) { core->abort(ticket); })
      .def("declare_lost", &AccumulatorCore::declare_lost)
      .def("close",
           [](const CorePtr& core, double number, const std::optional<at::Tensor>& tensor) {
             core->close(weight_of(number, tensor));
           })
      .def("can_abort", &AccumulatorCore::can_abort)
      .def("is_open", [](const CorePtr& core) { return core->is_open(); })
      .def("size", [](const CorePtr& core) { return static_cast<std::int64_t>(core->size()); })
      .def("add",
           [](const CorePtr& core, const Numbers& numbers, Tensors grads, double number,
              const std::optional<at::Tensor>& tensor) {
             const std::vector<std::size_t> indices = indices_of_grads(core, numbers, grads);
             core->add(indices, std::move(grads), weight_of(number, tensor));
           })
      .def("add_to_open",
           [](const CorePtr& core, const Numbers& numbers, Tensors grads) {
             const std::vector<std::size_t> indices = indices_of_grads(core, numbers, grads);
             core->add_to_open(indices, std::move(grads));
           })
      .def("merge", [](const CorePtr& core, const CorePtr& other) { core->merge(*other); })
      .def("linear", &linear)
      .def("embedding", &embedding)
      .def("add_in_backward", &AccumulatorCore::add_in_backward)
      .def("ignore_node_hooks", &AccumulatorCore::ignore_node_hooks)
      .def("micro_batches", &AccumulatorCore::micro_batches)
      .def("weight", &AccumulatorCore::weight)
      .def("measure_first", &AccumulatorCore::measure_first)
      .def("first_micro_batch", &AccumulatorCore::first_micro_batch)
      .def("written", [](const CorePtr& core) { return numbers_of(core->written()); })
      .def("sums",
           [](const CorePtr& core, const Numbers& indices) {
             return core->sums(written_indices_of(core, indices));
           })
      .def("zero_missing",
           [](const CorePtr& core, const Numbers& indices) {
             core->zero_missing(indices_of(core, indices));
           })
      .def("scale_sums",
           [](const CorePtr& core, const Numbers& indices, const at::Tensor& coefficient) {
             return core->scale_sums(written_indices_of(core, indices), coefficient);
           })
      .def("forget",
           [](const CorePtr& core, const Numbers& indices) {
             core->forget(written_indices_of(core, indices));
           })
      .def("check_steppable", &AccumulatorCore::check_steppable)
      .def("measure",
           [](const CorePtr& core) {
             SumStatistics statistics = core->measure();
             return std::make_tuple(std::move(statistics.norm), std::move(statistics.found_inf));
           })
      .def("prepare_step", &prepare_step)
      .def("normalise", &normalise)
      .def("masters",
           [](const CorePtr& core, const Numbers& indices) {
             return core->masters().current(indices_of(core, indices));
           })
      .def("shares_memory", [](const CorePtr& core) { return shares_memory(core->params()); })
      .def("lend_masters",
           [](const CorePtr& core, const Numbers& indices) {
             core->masters().lend(indices_of(core, indices));
           })
      .def("take_masters_back", [](const CorePtr& core) { core->masters().take_back(); })
      .def("reset", &AccumulatorCore::reset)
      .def("noise_scale", [](const CorePtr& core) { return core->noise().scale(); })
      .def("state", &AccumulatorCore::state)
      .def("load_state", &AccumulatorCore::load_state);
}

}  // namespace torch_ext
