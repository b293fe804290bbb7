// The memory order of out and of the gradients: torch's, so that a view or an in-place operation
// that works on torch's result works on this one. One rule for every device and for symbolic
// shapes.
//
// torch has two ways on the CPU. Its flash kernel leaves out in query's order of memory and the
// gradients as (batch, length, heads, dim), whatever the inputs are. All that this kernel does not
// take (dropout, value_dim other than head_dim, a mask that requires grad, most broadcasting) torch
// writes out as products: out, grad_query and grad_value are contiguous, and grad_key is the
// transpose of a contiguous product.
#pragma once

#include "attention_arguments.h"

namespace torch_ext {

/// Whether torch's CPU takes its flash kernel.
template <typename Int>
bool is_flash_call(const AttentionArguments& arguments, const AttentionGeometry<Int>& geometry);

extern template bool is_flash_call(const AttentionArguments&,
                                   const AttentionGeometry<std::int64_t>&);
extern template bool is_flash_call(const AttentionArguments&,
                                   const AttentionGeometry<c10::SymInt>&);

/// out of checked arguments, uninitialised.
template <typename Int>
at::Tensor attention_out(const AttentionArguments& arguments,
                         const AttentionGeometry<Int>& geometry);

extern template at::Tensor attention_out(const AttentionArguments&,
                                         const AttentionGeometry<std::int64_t>&);
extern template at::Tensor attention_out(const AttentionArguments&,
                                         const AttentionGeometry<c10::SymInt>&);

/// The gradient of query, key or value in the shape that it broadcasts to, uninitialised.
template <typename Int>
at::Tensor attention_gradient(const AttentionArguments& arguments,
                              const AttentionGeometry<Int>& geometry, AttentionTensor input,
                              at::ScalarType type);

extern template at::Tensor attention_gradient(const AttentionArguments&,
                                              const AttentionGeometry<std::int64_t>&,
                                              AttentionTensor, at::ScalarType);
extern template at::Tensor attention_gradient(const AttentionArguments&,
                                              const AttentionGeometry<c10::SymInt>&,
                                              AttentionTensor, at::ScalarType);

}  // namespace torch_ext
