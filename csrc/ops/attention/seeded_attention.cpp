// torch_ext::attention_with_logsumexp, a composite.
#include "seeded_attention.h"

#include <torch/library.h>

#include "attention_checks.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

OptionalTensor optional(const at::Tensor* tensor) {
  return tensor == nullptr ? std::nullopt : OptionalTensor(*tensor);
}

ForwardResult attention_with_logsumexp(const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, const OptionalTensor& attn_mask,
                                       double dropout_p, bool is_causal,
                                       std::optional<double> scale, bool enable_gqa,
                                       c10::SymInt causal_offset,
                                       const OptionalTensor& key_padding_mask,
                                       const OptionalTensor& dropout_seed) {
  // Its callers know it as attention_forward().
  return seeded_attention_forward("attention_forward",
                                  {.query = query,
                                   .key = key,
                                   .value = value,
                                   .attn_mask = given(attn_mask),
                                   .dropout_p = dropout_p,
                                   .is_causal = is_causal,
                                   .scale = scale,
                                   .enable_gqa = enable_gqa,
                                   .key_padding_mask = given(key_padding_mask),
                                   .dropout_seed = given(dropout_seed)},
                                  causal_offset);
}

}  // namespace

ForwardResult seeded_attention_forward(const char* op, const AttentionArguments& arguments,
                                       const c10::SymInt& causal_offset) {
  const bool draws = arguments.dropout_p > 0.0 && arguments.dropout_seed == nullptr;
  check_attention<c10::SymInt>(op, arguments,
                               draws ? SeedArgument::kDrawnLater : SeedArgument::kRequired);
  OptionalTensor seed = optional(arguments.dropout_seed);
  if (draws) seed = draw_dropout_seed(arguments.query);
  const at::Tensor* mask = arguments.attn_mask;
  const bool contiguous = arguments.contiguous || is_variable(mask);
  return call_attention_forward(arguments.query, arguments.key, arguments.value, optional(mask),
                                arguments.dropout_p, arguments.is_causal, arguments.scale,
                                arguments.enable_gqa, causal_offset,
                                optional(arguments.key_padding_mask), seed, contiguous);
}

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp));
}

}  // namespace torch_ext
