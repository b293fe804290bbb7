// aten's flash attention on packed sequences, for which torch has no CPU kernel: what
// torch.nn.attention.varlen.varlen_attn and varlen_attn_out end in.
//
// The kernels are boxed and read their arguments by name: releases of torch have added some.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../attention/plain_dispatch.h"
#include "../varlen/varlen_operators.h"
#include "sdpa_override_kernels.h"

namespace torch_ext {
namespace {

/// A call's arguments on the stack, by name.
class NamedArguments {
 public:
  NamedArguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : schema_(op.schema()),
        values_(stack.end() - static_cast<std::ptrdiff_t>(schema_.arguments().size()),
                stack.end()) {}

  std::size_t count() const { return values_.size(); }
  /// None where this release of torch has no such argument.
  c10::IValue operator[](const std::string& name) const {
    const std::optional<int> index = schema_.argumentIndexWithName(name);
    return index.has_value() ? values_[static_cast<std::size_t>(*index)] : c10::IValue();
  }
  at::Tensor tensor(const std::string& name) const { return (*this)[name].toTensor(); }
  OptionalTensor optional_tensor(const std::string& name) const {
    return (*this)[name].toOptional<at::Tensor>();
  }

 private:
  const c10::FunctionSchema& schema_;
  std::vector<c10::IValue> values_;
};

std::int64_t bound(const c10::IValue& size) {
  const std::int64_t value = size.isNone() ? -1 : size.toSymInt().guard_int(__FILE__, __LINE__);
  return value < 0 ? -1 : value;
}

VarlenArguments varlen_arguments(const char* op, const NamedArguments& given_arguments) {
  const OptionalTensor cu_seq_q = given_arguments.optional_tensor("cum_seq_q");
  const OptionalTensor cu_seq_k = given_arguments.optional_tensor("cum_seq_k");
  TORCH_CHECK_NOT_IMPLEMENTED(
      given(cu_seq_q) != nullptr && given(cu_seq_k) != nullptr, "torch_ext: aten::", op,
      " takes cum_seq_q and cum_seq_k on the CPU, got None: dense calls are those of "
      "torch.nn.functional.scaled_dot_product_attention");
  VarlenArguments arguments{.query = given_arguments.tensor("query"),
                            .key = given_arguments.tensor("key"),
                            .value = given_arguments.tensor("value"),
                            .cu_seq_q = *cu_seq_q,
                            .cu_seq_k = *cu_seq_k,
                            .max_q = given_arguments["max_q"].toSymInt(),
                            .max_k = given_arguments["max_k"].toSymInt(),
                            .dropout_p = given_arguments["dropout_p"].toDouble(),
                            .scale = given_arguments["scale"].toOptional<double>(),
                            .window_size = {bound(given_arguments["window_size_left"]),
                                            bound(given_arguments["window_size_right"])},
                            .enable_gqa = true,  // torch has compared the heads
                            .seqused_k = given_arguments.optional_tensor("seqused_k"),
                            .alibi_slopes = given_arguments.optional_tensor("alibi_slopes")};
  if (given_arguments["is_causal"].toBool()) arguments.window_size[1] = 0;
  return arguments;
}

/// The seed of a call's dropout, which torch hands to the backward pass as rng_state.
void draw_seed(VarlenArguments& arguments) {
  if (arguments.dropout_p > 0.0) arguments.dropout_seed = draw_dropout_seed(arguments.query);
}

void flash_forward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const NamedArguments given_arguments(op, *stack);
  VarlenArguments arguments = varlen_arguments("_flash_attention_forward", given_arguments);
  draw_seed(arguments);
  auto [out, logsumexp] = call_varlen_attention_forward(arguments);
  const at::Tensor rng_state =
      arguments.dropout_seed.value_or(at::zeros({1}, arguments.query.options().dtype(at::kLong)));
  const at::Tensor nothing = at::empty({0}, arguments.query.options());
  torch::jit::drop(*stack, given_arguments.count());
  torch::jit::push(*stack, std::move(out), std::move(logsumexp), rng_state, nothing, nothing);
}

void flash_forward_inplace(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const NamedArguments given_arguments(op, *stack);
  const VarlenArguments arguments =
      varlen_arguments("_flash_attention_forward_no_dropout_inplace", given_arguments);
  const at::Tensor target = given_arguments.tensor("out");
  auto [out, logsumexp] = call_varlen_attention_forward(arguments);
  TORCH_CHECK(target.sizes() == out.sizes() && target.scalar_type() == out.scalar_type(),
              "torch_ext: aten::_flash_attention_forward_no_dropout_inplace: out takes ",
              out.scalar_type(), " of shape ", out.sizes(), ", got ", target.scalar_type(),
              " of shape ", target.sizes());
  target.copy_(out);
  torch::jit::drop(*stack, given_arguments.count());
  torch::jit::push(*stack, std::move(logsumexp));
}

void flash_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const NamedArguments given_arguments(op, *stack);
  VarlenArguments arguments = varlen_arguments("_flash_attention_backward", given_arguments);
  if (arguments.dropout_p > 0.0) arguments.dropout_seed = given_arguments.tensor("rng_state");
  auto [grad_query, grad_key, grad_value, grad_sink] =
      call_varlen_attention_backward(arguments, {.grad_out = given_arguments.tensor("grad_out"),
                                                 .grad_logsumexp = std::nullopt,
                                                 .out = given_arguments.tensor("out"),
                                                 .logsumexp = given_arguments.tensor("logsumexp")});
  torch::jit::drop(*stack, given_arguments.count());
  torch::jit::push(*stack, std::move(grad_query), std::move(grad_key), std::move(grad_value));
}

template <c10::BoxedKernel::BoxedKernelFunction* kKernel>
void override_if_there(torch::Library& library, const char* name) {
  if (!c10::Dispatcher::singleton().findSchema({std::string("aten::") + name, ""}).has_value()) {
    return;
  }
  library.impl(name, torch::CppFunction::makeFromBoxedFunction<kKernel>());
}

}  // namespace

void override_varlen_attention(std::vector<torch::Library>& libraries) {
  libraries.emplace_back(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  torch::Library& library = libraries.back();
  override_if_there<flash_forward>(library, "_flash_attention_forward");
  override_if_there<flash_forward_inplace>(library, "_flash_attention_forward_no_dropout_inplace");
  override_if_there<flash_backward>(library, "_flash_attention_backward");
}

}  // namespace torch_ext
