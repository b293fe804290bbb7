// The core as torch.classes.torch_ext.AccumulatorCore, for the Python front: a TorchScript class,
// so that nothing of Python is linked.
#include <torch/custom_class.h>

#include <tuple>
#include <utility>

#include "gradient_accumulator_core.h"
#include "gradient_accumulator_layers.h"

namespace torch_ext {
namespace {

using CorePtr = c10::intrusive_ptr<AccumulatorCore>;
using Numbers = std::vector<std::int64_t>;
using Tensors = std::vector<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

std::vector<std::size_t> indices_of(const Numbers& numbers) {
  return {numbers.begin(), numbers.end()};
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
  StepScale scale = core->normalise(core->measure(), core->weight(), core->first_micro_batch(),
                                    multiplier, inverse_scale, max_norm);
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
      .def("close",
           [](const CorePtr& core, double number, const std::optional<at::Tensor>& tensor) {
             core->close(weight_of(number, tensor));
           })
      .def("abort", &AccumulatorCore::abort)
      .def("is_open", &AccumulatorCore::is_open)
      .def("size", [](const CorePtr& core) { return static_cast<std::int64_t>(core->size()); })
      .def("add",
           [](const CorePtr& core, const Numbers& indices, Tensors grads, double number,
              const std::optional<at::Tensor>& tensor) {
             core->add(indices_of(indices), std::move(grads), weight_of(number, tensor));
           })
      .def("add_to_open",
           [](const CorePtr& core, const Numbers& indices, Tensors grads) {
             core->add_to_open(indices_of(indices), std::move(grads));
           })
      .def("merge", [](const CorePtr& core, const CorePtr& other) { core->merge(*other); })
      .def("linear", &accumulating_linear)
      .def("embedding", &accumulating_embedding)
      .def("add_in_backward", &AccumulatorCore::add_in_backward)
      .def("ignore_node_hooks", &AccumulatorCore::ignore_node_hooks)
      .def("micro_batches", &AccumulatorCore::micro_batches)
      .def("weight", &AccumulatorCore::weight)
      .def("measure_first", &AccumulatorCore::measure_first)
      .def("first_micro_batch", &AccumulatorCore::first_micro_batch)
      .def("written", [](const CorePtr& core) { return numbers_of(core->written()); })
      .def("sums", [](const CorePtr& core,
                      const Numbers& indices) { return core->sums(indices_of(indices)); })
      .def("zero_missing", [](const CorePtr& core,
                              const Numbers& indices) { core->zero_missing(indices_of(indices)); })
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
             return core->masters().current(indices_of(indices));
           })
      .def("mark_stepped",
           [](const CorePtr& core, const Numbers& indices) {
             core->masters().mark_stepped(indices_of(indices));
           })
      .def("reset", &AccumulatorCore::reset)
      .def("noise_scale", [](const CorePtr& core) { return core->noise().scale(); })
      .def("state", &AccumulatorCore::state)
      .def("load_state", &AccumulatorCore::load_state);
}

}  // namespace torch_ext
