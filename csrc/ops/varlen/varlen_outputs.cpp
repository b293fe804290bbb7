#include "varlen_outputs.h"

#include <ATen/ops/empty.h>

#include "../attention/attention_arguments.h"

namespace torch_ext {

VarlenForwardResult varlen_outputs(const VarlenArguments& arguments, const VarlenSizes& sizes) {
  const at::Tensor& query = arguments.query;
  return {at::empty_symint({sizes.total_q, sizes.heads, sizes.value_dim}, query.options()),
          at::empty_symint({sizes.heads, sizes.total_q},
                           query.options().dtype(accumulate_type(query.scalar_type())))};
}

VarlenBackwardResult varlen_gradient_outputs(const VarlenArguments& arguments,
                                             std::array<bool, 4> output_mask) {
  const auto like = [](const at::Tensor& tensor, bool wanted) {
    return wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : at::Tensor();
  };
  return {like(arguments.query, output_mask[0]), like(arguments.key, output_mask[1]),
          like(arguments.value, output_mask[2]),
          output_mask[3] ? like(*arguments.sink, true) : at::Tensor()};
}

}  // namespace torch_ext
