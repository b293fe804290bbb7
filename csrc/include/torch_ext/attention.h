// Fused attention. All functions go through PyTorch's dispatcher: autograd (twice), autocast, vmap
// and torch.func work, and every call may come from any thread.
//
// Alphabet: batch... (at most 4 leading dimensions), heads, q_len, kv_len, head_dim, value_dim.
// Tensors of 2 dimensions have neither batch nor heads, those of 3 no batch. Any strides are read
// where they lie: transposed heads, slices of packed projections and expanded batches are not
// copied. dtypes: float32, float64, bfloat16 and float16.
//
// Wrong arguments throw c10::Error, naming the operator, the argument, what it takes and what it
// got, before anything is computed or drawn from a generator.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace torch_ext {

/// softmax(scale * query key^T + mask) value, with the meaning of
/// torch.nn.functional.scaled_dot_product_attention.
///
/// query      (batch..., heads, q_len, head_dim)
/// key        (batch..., kv_heads, kv_len, head_dim); leading dimensions broadcast with query's
/// value      (batch..., kv_heads, kv_len, value_dim)
/// attn_mask  broadcastable to (batch..., heads, q_len, kv_len). Bool: true = attend. Float or
///            query's dtype: added to the scaled scores; differentiable.
/// dropout_p  in [0, 1]: weights dropped at random, from the default generator.
/// is_causal  query i attends to keys j <= i. Not together with attn_mask.
/// scale      1 / sqrt(head_dim) by default.
/// enable_gqa kv_heads may be any divisor of heads.
///
/// Returns (batch..., heads, q_len, value_dim). A query that attends to nothing gives 0, and 0
/// gradients.
at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value,
                                        const std::optional<at::Tensor>& attn_mask = std::nullopt,
                                        double dropout_p = 0.0, bool is_causal = false,
                                        std::optional<double> scale = std::nullopt,
                                        bool enable_gqa = false);

/// What the functions below take beside their tensors. Fields mean what the arguments of
/// scaled_dot_product_attention() do.
struct AttentionOptions {
  std::optional<at::Tensor> attn_mask = std::nullopt;
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale = std::nullopt;
  bool enable_gqa = false;
  /// With is_causal, query i attends to keys j <= i + causal_offset: kv_len - q_len aligns the
  /// lower right corners. Moves the windows' and ALiBi's diagonal too.
  std::int64_t causal_offset = 0;
  /// Bool, broadcastable to (batch..., kv_len): true = ignore that key. Goes with any other mask.
  std::optional<at::Tensor> key_padding_mask = std::nullopt;
  /// int64, one element. The same seed drops the same weights. Drawn from the default generator
  /// where dropout_p > 0 and none is given.
  std::optional<at::Tensor> dropout_seed = std::nullopt;
  /// (left, right): query i attends to keys i - left <= j <= i + right; -1: no bound. is_causal
  /// bounds the right side by 0. Goes with any mask.
  std::array<std::int64_t, 2> window_size{-1, -1};
  /// > 0: scaled scores s become softcap * tanh(s / softcap), before masks are added.
  double softcap = 0.0;
  /// float32, (heads) or (batch..., heads): -slope * |i - j| is added to the scores. Has no
  /// gradient.
  std::optional<at::Tensor> alibi_slopes = std::nullopt;
  /// (heads), of any floating type: one more score of each row, without a value. Differentiable;
  /// logsumexp includes it.
  std::optional<at::Tensor> sink = std::nullopt;
  /// The diagonal of is_causal, window_size and alibi_slopes ends in the lower right corner: i
  /// stands for i + kv_len - q_len.
  bool causal_lower_right = false;
};

using AttentionForwardOptions = AttentionOptions;

/// scaled_dot_product_attention() with all options.
at::Tensor scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const AttentionOptions& options);

/// (out, logsumexp): logsumexp (batch..., heads, q_len) of each query's masked scores, float32 or
/// float64; -inf where it attends to nothing. Both are differentiable.
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const AttentionOptions& options = {});

/// A whole multi-head self-attention layer, with the parameters of nn.MultiheadAttention. Nothing
/// is transposed, copied or concatenated between its two projections, forward and backward.
///
/// input            (batch, seq, embed) or (seq, embed)
/// in_proj_weight   (3 * embed, embed): query, key and value one below the other
/// in_proj_bias     (3 * embed), or none
/// out_proj_weight  (embed, embed)
/// out_proj_bias    (embed), or none
/// num_heads        a divisor of embed
/// attn_mask        broadcastable to (batch, num_heads, seq, seq), as above
/// key_padding_mask bool, (batch, seq), or (seq) without a batch: true = ignore that key
///
/// Returns a tensor of input's shape.
at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const std::optional<at::Tensor>& in_proj_bias,
                          const at::Tensor& out_proj_weight,
                          const std::optional<at::Tensor>& out_proj_bias, std::int64_t num_heads,
                          const std::optional<at::Tensor>& attn_mask = std::nullopt,
                          double dropout_p = 0.0, bool is_causal = false,
                          const std::optional<at::Tensor>& key_padding_mask = std::nullopt);

/// The layer with all options that it has: scale, enable_gqa, causal_offset and dropout_seed throw.
at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const std::optional<at::Tensor>& in_proj_bias,
                          const at::Tensor& out_proj_weight,
                          const std::optional<at::Tensor>& out_proj_bias, std::int64_t num_heads,
                          const AttentionOptions& options);

/// Where the newest attention call of the process went, forward or backward: a kernel such as
/// "cpu.avx2.tile" or "cpu.avx2.decode"; "cpu.empty" where there was nothing to compute;
/// "torch: <reason>" where an overridden call was left to torch's own kernel; "none" before the
/// first call.
const char* last_attention_path() noexcept;

}  // namespace torch_ext
