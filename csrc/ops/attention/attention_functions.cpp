// The public C++ functions.
#include <torch_ext/attention.h>

#include "attention_signature.h"
#include "seeded_attention.h"

namespace torch_ext {

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

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const AttentionForwardOptions& options) {
  return seeded_attention_forward("attention_forward",
                                  {.query = &query,
                                   .key = &key,
                                   .value = &value,
                                   .attn_mask = given(options.attn_mask),
                                   .dropout_p = options.dropout_p,
                                   .is_causal = options.is_causal,
                                   .scale = options.scale,
                                   .enable_gqa = options.enable_gqa,
                                   .causal_offset = options.causal_offset,
                                   .key_padding_mask = given(options.key_padding_mask),
                                   .dropout_seed = given(options.dropout_seed)},
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

}  // namespace torch_ext
