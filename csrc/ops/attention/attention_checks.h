// Every refusal of a bad argument, shared by all devices and the symbolic shapes. Nothing is
// written, drawn or allocated before these have passed.
#pragma once

#include "attention_arguments.h"

namespace torch_ext {

/// Refuses what no operator of this family takes: `tensor` has to be a strided, floating tensor.
/// `op` is the operator's name without its namespace, `name` the argument's.
void check_tensor_kind(const char* op, const char* name, const at::Tensor& tensor);

/// check_tensor_kind() for query, key and value, before autograd or a transform touches them.
void check_attention_kinds(const char* op, const AttentionArguments& arguments);

/// Whether the arguments are given as the public operator draws its own seed.
enum class SeedArgument : std::uint8_t { kRequired, kDrawnLater };

/// Checks everything and broadcasts.
template <typename Int>
AttentionGeometry<Int> check_attention(const char* op, const AttentionArguments& arguments,
                                       SeedArgument seed);

extern template AttentionGeometry<std::int64_t> check_attention(const char*,
                                                                const AttentionArguments&,
                                                                SeedArgument);
extern template AttentionGeometry<c10::SymInt> check_attention(const char*,
                                                               const AttentionArguments&,
                                                               SeedArgument);

/// The part of check_attention() that is not about query, key and value: masks, dropout, scale. Of
/// those three only query is looked at, for its dtype and device.
template <typename Int>
void check_attention_options(const char* op, const AttentionArguments& arguments,
                             const AttentionGeometry<Int>& geometry, SeedArgument seed);

extern template void check_attention_options(const char*, const AttentionArguments&,
                                             const AttentionGeometry<std::int64_t>&, SeedArgument);
extern template void check_attention_options(const char*, const AttentionArguments&,
                                             const AttentionGeometry<c10::SymInt>&, SeedArgument);

template <typename Int>
void check_attention_gradients(const char* op, const AttentionArguments& arguments,
                               const AttentionGradients& gradients,
                               const AttentionGeometry<Int>& geometry);

extern template void check_attention_gradients(const char*, const AttentionArguments&,
                                               const AttentionGradients&,
                                               const AttentionGeometry<std::int64_t>&);
extern template void check_attention_gradients(const char*, const AttentionArguments&,
                                               const AttentionGradients&,
                                               const AttentionGeometry<c10::SymInt>&);

/// dropout_p in [0, 1].
void check_dropout_p(const char* op, double dropout_p);

/// An int64 tensor of one element on `device`.
void check_dropout_seed(const char* op, const at::Tensor* seed, c10::Device device);

/// (batch..., [heads,] q_len, kv_len) has 2 to 7 dimensions.
void check_score_sizes(const char* op, std::size_t dims);

/// Raises when forward-mode AD differentiates through any of `tensors`: the operators have no
/// tangents, and zeros would be silently wrong.
void check_no_tangents(const char* op, c10::ArrayRef<const at::Tensor*> tensors);

}  // namespace torch_ext
