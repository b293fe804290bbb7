#include <ATen/record_function.h>

#include "attention_autograd.h"
#include "symbolic_sizes.h"

namespace torch_ext {

at::Tensor mask_copy(const at::Tensor& mask) {
  const at::DisableRecordFunctionGuard one_entry_a_call;  // in a profile
  at::Tensor once = mask.detach();
  for (std::int64_t dim = 0; dim < once.dim(); ++dim) {
    if (is_zero(once.sym_stride(dim)) && TORCH_GUARD_OR_FALSE(once.sym_size(dim).sym_gt(1))) {
      once = once.narrow(dim, 0, 1);
    }
  }
  return once.clone();
}

AttentionTensors saved_tensors(const AttentionArguments& arguments, bool keeps_mask) {
  return arguments.map_tensors([keeps_mask](AttentionTensor position, const at::Tensor& tensor) {
    const bool copied =
        position == kPadding || (position == kMask && !(keeps_mask && tensor.is_floating_point()));
    return copied ? mask_copy(tensor) : tensor;
  });
}

void SparseTensorList::push(const at::Tensor* tensor) {
  if (tensor != nullptr && tensor->defined()) {
    tensors_.push_back(*tensor);
    present_ |= std::int64_t{1} << size_;
  }
  ++size_;
}

torch::autograd::variable_list SparseTensorList::expand(
    const torch::autograd::variable_list& tensors, std::int64_t present, std::size_t size) {
  torch::autograd::variable_list result(size);
  auto next = tensors.begin();
  for (std::size_t position = 0; position < size; ++position) {
    if ((present >> position & 1) != 0) result[position] = *next++;
  }
  return result;
}

namespace {

template <typename Option>
bool is_same(const Option& a, const Option& b) {
  return a == b;
}

/// Of known sizes alone: a comparison of symbols would become a guard.
bool is_same(const c10::SymInt& a, const c10::SymInt& b) {
  return !a.is_symbolic() && !b.is_symbolic() && a.maybe_as_int() == b.maybe_as_int();
}

}  // namespace

// Each entry costs a hash of its name both ways: a call is saved by how it differs from the plain
// one.
void save_options(torch::autograd::AutogradContext& context, const AttentionArguments& arguments) {
  static const AttentionArguments plain;
  AttentionArguments::visit_options(
      arguments, plain,
      [&context](const char* name, const auto& option, const auto& default_value) {
        if (!is_same(option, default_value)) context.saved_data[name] = option;
      });
}

AttentionArguments load_options(const torch::autograd::AutogradContext& context) {
  AttentionArguments arguments;
  AttentionArguments::visit_options(
      arguments, arguments, [&context](const char* name, auto& option, const auto& /*same*/) {
        using Option = std::remove_reference_t<decltype(option)>;
        const auto saved = context.saved_data.find(name);
        if (saved != context.saved_data.end()) option = saved->second.template to<Option>();
      });
  return arguments;
}

}  // namespace torch_ext
