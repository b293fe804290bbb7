// vmap: the samples one by one, in place. What one sample writes must not be shared with another.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "../attention/vmap_level.h"
#include "accumulation_operators.h"

namespace torch_ext {
namespace {

using Stack = torch::jit::Stack;

/// Calls `visit` for each tensor that an argument holds.
template <typename Visit>
void visit_tensors(const c10::IValue& argument, const Visit& visit) {
  if (argument.isTensor()) {
    if (argument.toTensor().defined()) visit(argument.toTensor());
  } else if (argument.isTensorList()) {
    for (const at::Tensor& tensor : argument.toTensorVector()) visit(tensor);
  }
}

c10::IValue sample_of(const VmapLevel& level, const c10::IValue& argument, std::int64_t index) {
  if (argument.isTensor() && argument.toTensor().defined()) {
    return level.sample(argument.toTensor(), index);
  }
  if (!argument.isTensorList()) return argument;
  std::vector<at::Tensor> samples = argument.toTensorVector();
  for (at::Tensor& tensor : samples) tensor = level.sample(tensor, index);
  return samples;
}

std::int64_t batch_size_of(const VmapLevel& level) {
  return level.batch_size().guard_int(__FILE__, __LINE__);
}

/// An operator that writes its arguments and returns nothing.
void in_place_vmap(const c10::OperatorHandle& op, Stack* stack) {
  const std::vector<c10::Argument>& declared = op.schema().arguments();
  const std::string name = op.schema().name().substr(std::string("torch_ext::").size());
  const std::vector<c10::IValue> arguments = torch::jit::pop(*stack, declared.size());
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& argument : arguments) {
    visit_tensors(argument, [&](const at::Tensor& tensor) { tensors.push_back(tensor); });
  }
  std::vector<const at::Tensor*> pointers;
  pointers.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) pointers.push_back(&tensor);
  const VmapLevel level(name.c_str(), pointers);
  for (std::size_t i = 0; i < declared.size(); ++i) {
    const c10::AliasInfo* alias = declared[i].alias_info();
    if (alias == nullptr) continue;
    visit_tensors(arguments[i], [&](const at::Tensor& tensor) {
      TORCH_CHECK(level.is_mapped(tensor), "torch_ext::", name, ": ", declared[i].name(),
                  " takes tensors that torch.vmap maps, as it maps other arguments: the samples "
                  "cannot share what they write");
    });
  }
  const std::int64_t batch_size = batch_size_of(level);
  for (std::int64_t index = 0; index < batch_size; ++index) {
    Stack samples;
    samples.reserve(arguments.size());
    for (const c10::IValue& argument : arguments) {
      samples.push_back(sample_of(level, argument, index));
    }
    op.callBoxed(samples);
  }
}

GradStatsResult grad_stats_vmap(at::TensorList grads) {
  std::vector<const at::Tensor*> pointers;
  pointers.reserve(grads.size());
  for (const at::Tensor& grad : grads) pointers.push_back(&grad);
  const VmapLevel level("grad_stats", pointers);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_ext::grad_stats", "")
                             .typed<GradStatsResult(at::TensorList)>();
  std::vector<at::Tensor> norm, norms, found_inf;
  const std::int64_t batch_size = batch_size_of(level);
  for (std::int64_t index = 0; index < batch_size; ++index) {
    std::vector<at::Tensor> samples;
    samples.reserve(grads.size());
    for (const at::Tensor& grad : grads) samples.push_back(level.sample(grad, index));
    auto [sample_norm, sample_norms, sample_found_inf] = op.call(samples);
    norm.push_back(std::move(sample_norm));
    norms.push_back(std::move(sample_norms));
    found_inf.push_back(std::move(sample_found_inf));
  }
  if (batch_size == 0) {
    const auto options = grads[0].options().dtype(norm_type(grads));
    return {level.wrap(at::empty({0}, options)),
            level.wrap(at::empty({0, static_cast<std::int64_t>(grads.size())}, options)),
            level.wrap(at::empty({0}, options.dtype(at::kFloat)))};
  }
  return {level.wrap(at::stack(norm)), level.wrap(at::stack(norms)),
          level.wrap(at::stack(found_inf))};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("grad_stats", TORCH_FN(grad_stats_vmap));
  for (const char* name : {"grad_accumulate_", "linear_wgrad_", "embedding_wgrad_", "adamw_step_",
                           "adamw_step_.tensor_lr", "sgd_step_", "sgd_step_.tensor_lr"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_place_vmap>());
  }
}

}  // namespace torch_ext
