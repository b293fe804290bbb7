// aten::_native_multi_head_attention, overridden: the inference fast path of nn.MultiheadAttention,
// and through aten::_transformer_encoder_layer_fwd that of nn.TransformerEncoderLayer and
// nn.TransformerEncoder, which hands over nested tensors when it has a padding mask.
#include <ATen/NestedTensorImpl.h>
#include <ATen/ops/_nested_from_padded.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

#include "../attention/attention_path.h"
#include "../attention/attention_signature.h"
#include "sdpa_override_kernels.h"
#include "torch_backend_choice.h"

namespace torch_ext {

TorchMultiHeadAttention torch_cuda_multi_head_attention = nullptr;

namespace {

// Which of the two masks of self_attention a mask of the fast path is. The fast path's masks are
// boolean in meaning, non-zero = ignore, whatever their dtype.
enum class FastPathMask : std::int64_t { kSource = 0, kKeyPadding = 1, kMerged = 2 };

struct SelfAttentionMasks {
  OptionalTensor attn_mask;         // True = attend; (seq, seq) or (batch, heads, seq, seq)
  OptionalTensor key_padding_mask;  // True = ignore; (batch, seq)
};

bool takes_parameters(const at::Tensor& query, const at::Tensor& qkv_weight,
                      const at::Tensor& qkv_bias, const at::Tensor& proj_weight,
                      const at::Tensor& proj_bias) {
  for (const at::Tensor* parameter : {&qkv_weight, &qkv_bias, &proj_weight, &proj_bias}) {
    if (!parameter->defined() || !is_plain_floating(*parameter) ||
        parameter->device() != query.device() || parameter->scalar_type() != query.scalar_type()) {
      return false;
    }
  }
  return true;
}

// Wrong shapes are left to torch's own kernel, whose errors name its arguments.
bool takes_shapes(std::int64_t embed_dim, std::int64_t num_heads, const at::Tensor& qkv_weight,
                  const at::Tensor& qkv_bias, const at::Tensor& proj_weight,
                  const at::Tensor& proj_bias) {
  return num_heads > 0 && embed_dim > 0 && embed_dim % num_heads == 0 &&
         qkv_weight.sizes() == at::IntArrayRef{3 * embed_dim, embed_dim} &&
         qkv_bias.sizes() == at::IntArrayRef{3 * embed_dim} &&
         proj_weight.sizes() == at::IntArrayRef{embed_dim, embed_dim} &&
         proj_bias.sizes() == at::IntArrayRef{embed_dim};
}

// (batch, seq, embed): query
bool takes_mask(const at::Tensor& query, std::int64_t num_heads, const at::Tensor& mask,
                std::optional<std::int64_t> mask_type) {
  if (!mask_type.has_value() || mask.device() != query.device() || mask.is_nested() ||
      mask.layout() != at::kStrided) {
    return false;
  }
  const std::int64_t batch = query.size(0);
  const std::int64_t seq = query.size(1);
  switch (static_cast<FastPathMask>(*mask_type)) {
    case FastPathMask::kSource:
      return mask.sizes() == at::IntArrayRef{seq, seq};
    case FastPathMask::kKeyPadding:
      return mask.sizes() == at::IntArrayRef{batch, seq};
    case FastPathMask::kMerged:
      return mask.sizes() == at::IntArrayRef{batch, num_heads, seq, seq};
  }
  return false;
}

// One entry where every index reads the same memory: nn.MultiheadAttention expands its mask to
// (batch, heads, seq, seq), and converting that as it stands would write all of it.
at::Tensor without_repeats(at::Tensor mask) {
  for (std::int64_t dim = 0; dim < mask.dim(); ++dim) {
    if (mask.stride(dim) == 0 && mask.size(dim) > 1) mask = mask.narrow(dim, 0, 1);
  }
  return mask;
}

SelfAttentionMasks masks_of(const OptionalTensor& mask, std::optional<std::int64_t> mask_type) {
  SelfAttentionMasks masks;
  const at::Tensor* ignore = given(mask);
  if (ignore == nullptr) return masks;
  if (static_cast<FastPathMask>(*mask_type) == FastPathMask::kKeyPadding) {
    masks.key_padding_mask = ignore->to(at::kBool);
  } else {
    masks.attn_mask = without_repeats(*ignore).to(at::kBool).logical_not();
  }
  return masks;
}

// Null where the call is torch_ext's. takes: whether its arguments are.
const char* why_torch(const at::Tensor& query, bool need_weights, bool takes) {
  if (need_weights) return kWeightsAskedFor;
  if (const char* reason = why_device_is_torchs(query)) return reason;
  return takes ? nullptr : "torch: nn.MultiheadAttention with what self_attention does not take";
}

at::Tensor self_attention_of(const at::Tensor& input, const at::Tensor& qkv_weight,
                             const at::Tensor& qkv_bias, const at::Tensor& proj_weight,
                             const at::Tensor& proj_bias, std::int64_t num_heads,
                             const SelfAttentionMasks& masks) {
  return call_self_attention(
      {.input = &input,
       .in_proj_weight = &qkv_weight,
       .in_proj_bias = &qkv_bias,
       .out_proj_weight = &proj_weight,
       .out_proj_bias = &proj_bias,
       .num_heads = num_heads},
      {.attn_mask = given(masks.attn_mask), .key_padding_mask = given(masks.key_padding_mask)});
}

std::tuple<at::Tensor, at::Tensor> torch_multi_head_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t embed_dim,
    std::int64_t num_heads, const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight, const at::Tensor& proj_bias, const OptionalTensor& mask,
    bool need_weights, bool average_attn_weights, std::optional<std::int64_t> mask_type) {
  const TorchMultiHeadAttention run = query.is_cuda()
                                          ? torch_cuda_multi_head_attention
                                          : &at::native::native_multi_head_attention_cpu;
  return run(query, key, value, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias,
             mask, need_weights, average_attn_weights, mask_type);
}

std::tuple<at::Tensor, at::Tensor> dense_multi_head_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t embed_dim,
    std::int64_t num_heads, const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight, const at::Tensor& proj_bias, const OptionalTensor& mask,
    bool need_weights, bool average_attn_weights, std::optional<std::int64_t> mask_type) {
  const at::Tensor* given_mask = given(mask);
  const bool fused =
      key.is_same(query) && value.is_same(query) && is_plain_floating(query) && query.dim() == 3 &&
      query.size(2) == embed_dim &&
      takes_parameters(query, qkv_weight, qkv_bias, proj_weight, proj_bias) &&
      takes_shapes(embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias) &&
      (given_mask == nullptr || takes_mask(query, num_heads, *given_mask, mask_type));
  if (const char* reason = why_torch(query, need_weights, fused)) {
    record_attention_path(reason);
    return torch_multi_head_attention(query, key, value, embed_dim, num_heads, qkv_weight, qkv_bias,
                                      proj_weight, proj_bias, mask, need_weights,
                                      average_attn_weights, mask_type);
  }
  return {self_attention_of(query, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads,
                            masks_of(mask, mask_type)),
          at::Tensor()};
}

// (batch, max_len), True behind each sequence's end. sizes: (batch, 2), each sequence's length and
// width.
at::Tensor padding_behind(const at::Tensor& sizes, std::int64_t max_len, c10::Device device) {
  const at::Tensor lengths = sizes.select(1, 0).unsqueeze(1).to(device);  // (batch, 1)
  return at::arange(max_len, lengths.options()).ge(lengths);
}

std::tuple<at::Tensor, at::Tensor> nested_multi_head_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t embed_dim,
    std::int64_t num_heads, const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight, const at::Tensor& proj_bias, const OptionalTensor& mask,
    bool need_weights, bool average_attn_weights, std::optional<std::int64_t> mask_type) {
  const at::ScalarType dtype = query.scalar_type();
  const bool fused =
      key.is_same(query) && value.is_same(query) && query.is_nested() && query.dim() == 3 &&
      query.numel() > 0 && query.is_contiguous() &&
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
       dtype == at::kDouble) &&
      at::native::get_nested_tensor_impl(query)->opt_size(2) == embed_dim &&
      given(mask) == nullptr &&
      takes_parameters(query, qkv_weight, qkv_bias, proj_weight, proj_bias) &&
      takes_shapes(embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias);
  if (const char* reason = why_torch(query, need_weights, fused)) {
    record_attention_path(reason);
    return torch_multi_head_attention(query, key, value, embed_dim, num_heads, qkv_weight, qkv_bias,
                                      proj_weight, proj_bias, mask, need_weights,
                                      average_attn_weights, mask_type);
  }
  const at::Tensor sizes = at::native::get_nested_sizes(query);  // (batch, 2) on the CPU
  const at::Tensor padded = query.to_padded_tensor(0.0);         // (batch, max_len, embed)
  SelfAttentionMasks masks;
  masks.key_padding_mask = padding_behind(sizes, padded.size(1), query.device());
  const at::Tensor out =
      self_attention_of(padded, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, masks);
  return {at::_nested_from_padded(out, sizes), at::Tensor()};
}

// torch warns once per process when a kernel replaces another one at the same key. Here that is
// the purpose, and the warning would be spent on it.
class SilentWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& /*warning*/) override {}
};

}  // namespace

void override_multi_head_attention(std::vector<torch::Library>& libraries) {
  SilentWarnings silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  const auto add = [&libraries](c10::DispatchKey key) -> torch::Library& {
    return libraries.emplace_back(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  };
  const auto override_device = [&add](c10::DispatchKey dense, c10::DispatchKey nested) {
    add(dense).impl("_native_multi_head_attention", TORCH_FN(dense_multi_head_attention));
    add(nested).impl("_native_multi_head_attention", TORCH_FN(nested_multi_head_attention));
  };
  override_device(c10::DispatchKey::CPU, c10::DispatchKey::NestedTensorCPU);
  if (torch_cuda_multi_head_attention != nullptr && has_kernels_for(c10::kCUDA)) {
    override_device(c10::DispatchKey::CUDA, c10::DispatchKey::NestedTensorCUDA);
  }
}

}  // namespace torch_ext
