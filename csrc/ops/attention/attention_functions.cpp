// The public C++ functions.
#include <torch_ext/attention.h>

#include "attention_signature.h"
#include "scaled_dot_product_attention_composite.h"
#include "seeded_attention.h"

namespace torch_ext {
namespace {

/// Refers to the options.
AttentionArguments arguments_of(const AttentionOptions& options) {
  return {.attn_mask = given(options.attn_mask),
          .dropout_p = options.dropout_p,
          .is_causal = options.is_causal,
          .scale = options.scale,
          .enable_gqa = options.enable_gqa,
          .causal_offset = options.causal_offset,
          .key_padding_mask = given(options.key_padding_mask),
          .dropout_seed = given(options.dropout_seed),
          .window_left = options.window_size[0],
          .window_right = options.window_size[1],
          .softcap = options.softcap,
          .alibi_slopes = given(options.alibi_slopes),
          .sink = given(options.sink),
          .causal_lower_right = options.causal_lower_right};
}

AttentionArguments arguments_of(const at::Tensor& query, const at::Tensor& key,
                                const at::Tensor& value, const AttentionOptions& options) {
  AttentionArguments arguments = arguments_of(options);
  arguments.query = &query;
  arguments.key = &key;
  arguments.value = &value;
  return arguments;
}

}  // namespace

at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value,
                                        const std::optional<at::Tensor>& attn_mask,
                                        double dropout_p, bool is_causal,
                                        std::optional<double> scale, bool enable_gqa) {
  return call_scaled_dot_product_attention({.query = &query,
                                            .key = &key,
                                            .value = &value,
                                            .attn_mask = given(attn_mask),
                                            .dropout_p = dropout_p,
                                            .is_causal = is_causal,
                                            .scale = scale,
                                            .enable_gqa = enable_gqa});
}

at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const AttentionOptions& options) {
  return composite_scaled_dot_product_attention(arguments_of(query, key, value, options));
}

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const AttentionOptions& options) {
  return seeded_attention_forward("attention_forward", arguments_of(query, key, value, options),
                                  /*wants_logsumexp=*/true);
}

at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const std::optional<at::Tensor>& in_proj_bias,
                          const at::Tensor& out_proj_weight,
                          const std::optional<at::Tensor>& out_proj_bias, std::int64_t num_heads,
                          const std::optional<at::Tensor>& attn_mask, double dropout_p,
                          bool is_causal, const std::optional<at::Tensor>& key_padding_mask) {
  return call_self_attention({.input = &input,
                              .in_proj_weight = &in_proj_weight,
                              .in_proj_bias = given(in_proj_bias),
                              .out_proj_weight = &out_proj_weight,
                              .out_proj_bias = given(out_proj_bias),
                              .num_heads = num_heads},
                             {.attn_mask = given(attn_mask),
                              .dropout_p = dropout_p,
                              .is_causal = is_causal,
                              .key_padding_mask = given(key_padding_mask)});
}

at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const std::optional<at::Tensor>& in_proj_bias,
                          const at::Tensor& out_proj_weight,
                          const std::optional<at::Tensor>& out_proj_bias, std::int64_t num_heads,
                          const AttentionOptions& options) {
  TORCH_CHECK(!options.scale.has_value() && !options.enable_gqa && options.causal_offset == 0 &&
                  !options.dropout_seed.has_value(),
              "torch_ext::self_attention: options takes no scale, enable_gqa, causal_offset or "
              "dropout_seed");
  return call_self_attention({.input = &input,
                              .in_proj_weight = &in_proj_weight,
                              .in_proj_bias = given(in_proj_bias),
                              .out_proj_weight = &out_proj_weight,
                              .out_proj_bias = given(out_proj_bias),
                              .num_heads = num_heads},
                             arguments_of(options));
}

}  // namespace torch_ext
