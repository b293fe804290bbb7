// How: operators that take a generator have a kernel at a dispatch key that is switched on for the
// thread, comes before autograd, and falls through for every other operator. DeferredInit is the
// key that torch keeps for modes outside of itself.
#include "gradient_accumulator_random.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <utility>

namespace torch_ext {
namespace {

constexpr auto kKey = c10::DispatchKey::DeferredInit;
constexpr c10::DispatchKeySet kBelow(c10::DispatchKeySet::FULL_AFTER, kKey);

std::optional<at::Generator>& thread_generator() {
  thread_local std::optional<at::Generator> generator;
  return generator;
}

/// The device that the arguments are on; none where no argument is a tensor.
std::optional<c10::Device> device_of(const c10::ArrayRef<c10::IValue> arguments) {
  for (const c10::IValue& argument : arguments) {
    if (argument.isTensor() && argument.toTensor().defined()) return argument.toTensor().device();
  }
  return std::nullopt;
}

void draw_from_thread_generator(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                torch::jit::Stack* stack) {
  const std::optional<at::Generator>& generator = thread_generator();
  // Tracers and fake tensors record the call as it was made.
  if (generator.has_value() && !keys.has(c10::DispatchKey::Python)) {
    const auto& schema = op.schema().arguments();
    const c10::ArrayRef<c10::IValue> arguments = torch::jit::last(*stack, schema.size());
    const std::optional<c10::Device> device = device_of(arguments);
    for (std::size_t i = 0; i < schema.size(); ++i) {
      if (schema[i].name() != "generator" || !arguments[i].isNone()) continue;
      if (device.has_value() && *device != generator->device()) continue;
      torch::jit::peek(*stack, i, schema.size()) = c10::IValue(*generator);
    }
  }
  op.redispatchBoxed(keys & kBelow, stack);
}

}  // namespace

void set_thread_generator(std::optional<at::Generator> generator) {
  c10::impl::tls_set_dispatch_key_included(kKey, generator.has_value());
  thread_generator() = std::move(generator);
}

TORCH_LIBRARY_IMPL(_, DeferredInit, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

// Those with a kernel of a device's own; the others are made of them.
TORCH_LIBRARY_IMPL(aten, DeferredInit, m) {
  for (const char* name : {"bernoulli.out",
                           "bernoulli_.Tensor",
                           "bernoulli_.float",
                           "binomial",
                           "cauchy_",
                           "exponential_",
                           "geometric_",
                           "log_normal_",
                           "multinomial",
                           "multinomial.out",
                           "normal.Tensor_Tensor",
                           "normal.Tensor_Tensor_out",
                           "normal.Tensor_float",
                           "normal.Tensor_float_out",
                           "normal.float_Tensor",
                           "normal.float_Tensor_out",
                           "normal_",
                           "poisson",
                           "random_",
                           "random_.from",
                           "random_.to",
                           "randperm.generator_out",
                           "rrelu_with_noise",
                           "rrelu_with_noise.out",
                           "rrelu_with_noise_",
                           "_sample_dirichlet",
                           "_standard_gamma",
                           "uniform_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&draw_from_thread_generator>());
  }
}

}  // namespace torch_ext
