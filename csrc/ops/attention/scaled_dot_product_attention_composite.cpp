// torch_ext::scaled_dot_product_attention: torch's signature over attention_forward().
#include "scaled_dot_product_attention_composite.h"

#include <torch/library.h>

#include <numeric>

#include "attention_signature.h"
#include "seeded_attention.h"
#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "scaled_dot_product_attention";

/// torch lets key and value have different numbers of heads with enable_gqa. The kernels know one
/// number: the rare case repeats both to the least common multiple.
bool has_unequal_groups(const at::Tensor& key, const at::Tensor& value) {
  if (key.dim() < 3 || value.dim() < 3) return false;
  const c10::SymInt key_heads = key.sym_size(-3);
  const c10::SymInt value_heads = value.sym_size(-3);
  return !is_one(key_heads) && !is_one(value_heads) && !is_zero(key_heads) &&
         !is_zero(value_heads) && key_heads != value_heads;
}

at::Tensor attention(const AttentionArguments& arguments) {
  return std::get<0>(seeded_attention_forward(kOp, arguments, /*wants_logsumexp=*/false));
}

struct CompositeAttention {
  static at::Tensor attention(const AttentionArguments& arguments) {
    return composite_scaled_dot_product_attention(arguments);
  }
};

}  // namespace

at::Tensor composite_scaled_dot_product_attention(const AttentionArguments& arguments) {
  if (!arguments.enable_gqa || !has_unequal_groups(*arguments.key, *arguments.value)) {
    return attention(arguments);
  }
  const std::int64_t key_heads = arguments.key->size(-3);
  const std::int64_t value_heads = arguments.value->size(-3);
  const std::int64_t heads = std::lcm(key_heads, value_heads);
  const at::Tensor key = arguments.key->repeat_interleave(heads / key_heads, -3);
  const at::Tensor value = arguments.value->repeat_interleave(heads / value_heads, -3);
  AttentionArguments repeated = arguments;
  repeated.key = &key;
  repeated.value = &value;
  repeated.contiguous = true;
  return attention(repeated);
}

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl(kOp, TORCH_FN(scaled_dot_product_attention_kernel<CompositeAttention>));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl(kOp, TORCH_FN(scaled_dot_product_attention_kernel<CompositeAttention>));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl(kOp, TORCH_FN(scaled_dot_product_attention_kernel<CompositeAttention>));
}

}  // namespace torch_ext
