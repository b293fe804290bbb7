#include <ATen/record_function.h>

#include "attention_autograd.h"
#include "symbolic_sizes.h"

namespace torch_ext {

at::Tensor mask_copy(const at::Tensor* mask) {
  if (mask == nullptr) return {};
  const at::DisableRecordFunctionGuard one_entry_a_call;  // in a profile
  at::Tensor once = mask->detach();
  for (std::int64_t dim = 0; dim < once.dim(); ++dim) {
    if (is_zero(once.sym_stride(dim)) && TORCH_GUARD_OR_FALSE(once.sym_size(dim).sym_gt(1))) {
      once = once.narrow(dim, 0, 1);
    }
  }
  return once.clone();
}

void SparseTensorList::push(const at::Tensor* tensor) {
  if (tensor != nullptr && tensor->defined()) {
    tensors_.push_back(*tensor);
    present_ |= std::int64_t{1} << size_;
  }
  ++size_;
}

torch::autograd::variable_list SparseTensorList::expand(
    const torch::autograd::variable_list& tensors, std::int64_t present) {
  torch::autograd::variable_list result;
  auto next = tensors.begin();
  for (std::int64_t bits = present; bits != 0; bits >>= 1) {
    result.push_back((bits & 1) != 0 ? *next++ : at::Tensor());
  }
  return result;
}

void AttentionOptions::save(torch::autograd::AutogradContext& context) const {
  context.saved_data["dropout_p"] = dropout_p;
  context.saved_data["is_causal"] = is_causal;
  context.saved_data["scale"] = scale;
  context.saved_data["enable_gqa"] = enable_gqa;
  context.saved_data["causal_offset"] = causal_offset;
  context.saved_data["contiguous"] = contiguous;
}

AttentionOptions AttentionOptions::load(const torch::autograd::AutogradContext& context) {
  const auto& data = context.saved_data;
  return {.dropout_p = data.at("dropout_p").toDouble(),
          .is_causal = data.at("is_causal").toBool(),
          .scale = data.at("scale").toOptional<double>(),
          .enable_gqa = data.at("enable_gqa").toBool(),
          .causal_offset = data.at("causal_offset").toSymInt(),
          .contiguous = data.at("contiguous").toBool()};
}

}  // namespace torch_ext
