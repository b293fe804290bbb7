// torch_ext::scaled_dot_product_attention: torch's signature over attention_forward().
#include "scaled_dot_product_attention_composite.h"

#include <ATen/record_function.h>
#include <torch/library.h>

#include <numeric>

#include "attention_checks.h"
#include "attention_cpu.h"
#include "attention_layout.h"
#include "plain_dispatch.h"
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

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                     std::optional<double> scale, bool enable_gqa, bool contiguous) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .contiguous = contiguous};
  if (is_plain_cpu_inference({&query, &key, &value, arguments.attn_mask})) {
    RECORD_FUNCTION("torch_ext::attention_forward", c10::ArrayRef<const c10::IValue>{});
    const auto geometry = check_attention<std::int64_t>(kOp, arguments, SeedArgument::kDrawnLater);
    at::Tensor seed;
    AttentionArguments seeded = arguments;
    seeded.contiguous = contiguous || is_variable(arguments.attn_mask);
    if (dropout_p > 0.0) {
      seed = draw_dropout_seed(query);
      seeded.dropout_seed = &seed;
    }
    at::Tensor out = attention_out(seeded, geometry);
    run_attention_forward_cpu(seeded, /*causal_offset=*/0, geometry, out, /*logsumexp=*/nullptr);
    return out;
  }
  return std::get<0>(seeded_attention_forward(kOp, arguments, /*causal_offset=*/0));
}

}  // namespace

at::Tensor composite_scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const OptionalTensor& attn_mask, double dropout_p,
                                                  bool is_causal, std::optional<double> scale,
                                                  bool enable_gqa) {
  if (enable_gqa && has_unequal_groups(key, value)) {
    const std::int64_t key_heads = key.size(-3);
    const std::int64_t value_heads = value.size(-3);
    const std::int64_t heads = std::lcm(key_heads, value_heads);
    return attention(query, key.repeat_interleave(heads / key_heads, -3),
                     value.repeat_interleave(heads / value_heads, -3), attn_mask, dropout_p,
                     is_causal, scale, enable_gqa, /*contiguous=*/true);
  }
  return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                   /*contiguous=*/false);
}

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl(kOp, TORCH_FN(composite_scaled_dot_product_attention));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl(kOp, TORCH_FN(composite_scaled_dot_product_attention));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl(kOp, TORCH_FN(composite_scaled_dot_product_attention));
}

}  // namespace torch_ext
