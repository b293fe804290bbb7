#include "attention_layout.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <numeric>
#include <utility>

#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

template <typename Int>
using Sizes = typename AttentionGeometry<Int>::Sizes;

at::Tensor empty_strided_of(c10::ArrayRef<std::int64_t> sizes, c10::ArrayRef<std::int64_t> strides,
                            const at::TensorOptions& options) {
  return at::empty_strided(sizes, strides, options);
}

at::Tensor empty_strided_of(c10::ArrayRef<c10::SymInt> sizes, c10::ArrayRef<c10::SymInt> strides,
                            const at::TensorOptions& options) {
  return at::empty_strided_symint(sizes, strides, options);
}

/// Whether a tensor of `own` sizes has the sizes `broadcast` that it broadcasts to.
template <typename Int>
bool is_whole(c10::ArrayRef<Int> own, const Sizes<Int>& broadcast) {
  if (own.size() != broadcast.size()) return false;
  for (std::size_t dim = 0; dim < own.size(); ++dim) {
    if (is_one(own[dim]) != is_one(broadcast[dim])) return false;
  }
  return true;
}

template <typename Int>
bool has_elements(const Sizes<Int>& sizes) {
  for (const Int& size : sizes) {
    if (is_zero(size)) return false;
  }
  return true;
}

/// Strides of dense memory whose dimensions, outermost first, are `order`.
template <typename Int>
Sizes<Int> dense_strides(const Sizes<Int>& sizes, c10::ArrayRef<int> order) {
  Sizes<Int> strides(sizes.size(), Int(1));
  Int stride = 1;
  for (std::size_t place = order.size(); place-- > 0;) {
    strides[order[place]] = stride;
    // As torch counts, so that tensors without elements have its strides too.
    if (!is_zero(sizes[order[place]])) stride = stride * sizes[order[place]];
  }
  return strides;
}

/// Dimensions in the order of their names, of which two may be swapped.
c10::SmallVector<int, kMaxBatchDims + 3> dimensions(std::size_t rank) {
  c10::SmallVector<int, kMaxBatchDims + 3> order(rank);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

}  // namespace

template <typename Int>
bool is_flash_call(const AttentionArguments& arguments, const AttentionGeometry<Int>& geometry) {
  if (arguments.contiguous || arguments.dropout_p > 0.0) return false;
  const at::Tensor* inputs[] = {arguments.query, arguments.key, arguments.value};
  const std::int64_t rank = arguments.query->dim();
  if (rank != 3 && rank != 4) return false;
  for (const at::Tensor* input : inputs) {
    if (input->dim() != rank || !is_one(strides_of<Int>(*input)[rank - 1])) return false;
  }
  if (arguments.attn_mask != nullptr && rank == 4) {
    const std::int64_t mask_rank = arguments.attn_mask->dim();
    if (mask_rank != 2 && mask_rank != 4) return false;
  }
  // Key and value may share one head, as in grouped-query attention; nothing else may broadcast.
  return is_whole<Int>(sizes_of<Int>(*arguments.query), geometry.query_sizes()) &&
         is_whole<Int>(sizes_of<Int>(*arguments.key), geometry.key_sizes()) &&
         is_whole<Int>(sizes_of<Int>(*arguments.value), geometry.value_sizes()) &&
         same(geometry.head_dim, geometry.value_dim) && has_elements<Int>(geometry.query_sizes()) &&
         has_elements<Int>(geometry.key_sizes());
}

template bool is_flash_call(const AttentionArguments&, const AttentionGeometry<std::int64_t>&);
template bool is_flash_call(const AttentionArguments&, const AttentionGeometry<c10::SymInt>&);

template <typename Int>
at::Tensor attention_out(const AttentionArguments& arguments,
                         const AttentionGeometry<Int>& geometry) {
  const at::Tensor& query = *arguments.query;
  if (is_flash_call(arguments, geometry)) return at::empty_like(query);
  const Sizes<Int> sizes = geometry.out_sizes();
  return empty_strided_of(sizes, dense_strides<Int>(sizes, dimensions(sizes.size())),
                          query.options());
}

template at::Tensor attention_out(const AttentionArguments&,
                                  const AttentionGeometry<std::int64_t>&);
template at::Tensor attention_out(const AttentionArguments&, const AttentionGeometry<c10::SymInt>&);

template <typename Int>
at::Tensor attention_gradient(const AttentionArguments& arguments,
                              const AttentionGeometry<Int>& geometry, AttentionTensor input,
                              at::ScalarType type) {
  const Sizes<Int> sizes = input == kQuery ? geometry.query_sizes()
                           : input == kKey ? geometry.key_sizes()
                                           : geometry.value_sizes();
  auto order = dimensions(sizes.size());
  const auto last = order.end() - 1;
  // torch repeats grouped heads, whose sum is contiguous again.
  const bool grouped = arguments.enable_gqa && !same(geometry.kv_heads, geometry.query_heads);
  if (is_flash_call(arguments, geometry)) {
    std::swap(last[-2], last[-1]);
  } else if (input == kKey && geometry.rank >= 3 && !grouped) {
    std::swap(last[-1], last[0]);
  }
  return empty_strided_of(sizes, dense_strides<Int>(sizes, order),
                          arguments.query->options().dtype(type));
}

template at::Tensor attention_gradient(const AttentionArguments&,
                                       const AttentionGeometry<std::int64_t>&, AttentionTensor,
                                       at::ScalarType);
template at::Tensor attention_gradient(const AttentionArguments&,
                                       const AttentionGeometry<c10::SymInt>&, AttentionTensor,
                                       at::ScalarType);

}  // namespace torch_ext
