#include "packed_attention.h"

#include <ATen/ops/cat.h>
#include <c10/core/SymbolicShapeMeta.h>

#include "symbolic_sizes.h"

namespace torch_ext {

template <typename Int>
AttentionGeometry<Int> packed_geometry(c10::ArrayRef<Int> leading_sizes, std::int64_t num_heads,
                                       const Int& head_dim) {
  AttentionGeometry<Int> geometry;
  geometry.rank = static_cast<std::int64_t>(leading_sizes.size()) + 2;
  if (leading_sizes.size() == 2) geometry.batch_sizes[kMaxBatchDims - 1] = leading_sizes[0];
  geometry.query_heads = geometry.kv_heads = Int(num_heads);
  geometry.q_len = geometry.kv_len = leading_sizes.back();
  geometry.head_dim = geometry.value_dim = head_dim;
  return geometry;
}

template AttentionGeometry<std::int64_t> packed_geometry(c10::ArrayRef<std::int64_t>, std::int64_t,
                                                         const std::int64_t&);
template AttentionGeometry<c10::SymInt> packed_geometry(c10::ArrayRef<c10::SymInt>, std::int64_t,
                                                        const c10::SymInt&);

template <typename Int>
AttentionGeometry<Int> check_packed_qkv(const char* op, const at::Tensor& qkv,
                                        std::int64_t num_heads) {
  check_tensor_kind(op, "qkv", qkv);
  TORCH_CHECK(qkv.dim() == 2 || qkv.dim() == 3, "torch_ext::", op,
              ": qkv takes (batch, seq, 3 * embed) or (seq, 3 * embed), got ", qkv.sym_sizes());
  const auto sizes = sizes_of<Int>(qkv);
  TORCH_CHECK(num_heads > 0, "torch_ext::", op, ": num_heads takes a positive number, got ",
              num_heads);
  const Int& packed = sizes.back();
  TORCH_CHECK(equal(packed % Int(3 * num_heads), Int(0)), "torch_ext::", op,
              ": qkv takes a last dimension that 3 * num_heads, ", 3 * num_heads, ", divides, got ",
              packed);
  return packed_geometry<Int>(sizes.slice(0, sizes.size() - 1), num_heads,
                              packed / Int(3 * num_heads));
}

template AttentionGeometry<std::int64_t> check_packed_qkv(const char*, const at::Tensor&,
                                                          std::int64_t);
template AttentionGeometry<c10::SymInt> check_packed_qkv(const char*, const at::Tensor&,
                                                         std::int64_t);

void check_packed_out(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& qkv, bool any_type) {
  check_tensor_kind(op, name, tensor);
  TORCH_CHECK(any_type || tensor.scalar_type() == qkv.scalar_type(), "torch_ext::", op, ": ", name,
              " takes the dtype of qkv, ", qkv.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == qkv.device(), "torch_ext::", op, ": ", name,
              " takes the device of qkv, ", qkv.device(), ", got ", tensor.device());
  c10::SymDimVector sizes(qkv.sym_sizes().begin(), qkv.sym_sizes().end());
  sizes.back() = sizes.back() / 3;
  bool same = tensor.dim() == qkv.dim();
  for (std::size_t dim = 0; same && dim < sizes.size(); ++dim) {
    same = equal(tensor.sym_sizes()[dim], sizes[dim]);
  }
  TORCH_CHECK(same, "torch_ext::", op, ": ", name, " takes (batch, seq, embed) of qkv, ",
              c10::SymIntArrayRef(sizes), ", got ", tensor.sym_sizes());
}

at::Tensor head_view(const at::Tensor& packed, std::int64_t part,
                     const AttentionGeometry<std::int64_t>& geometry) {
  const std::int64_t col_stride = packed.stride(-1);
  c10::SmallVector<std::int64_t, 4> strides;
  if (packed.dim() == 3) strides.push_back(packed.stride(0));
  strides.push_back(geometry.head_dim * col_stride);
  strides.push_back(packed.stride(-2));
  strides.push_back(col_stride);
  const std::int64_t embed = geometry.query_heads * geometry.head_dim;
  return packed.as_strided(geometry.query_sizes(), strides,
                           packed.storage_offset() + part * embed * col_stride);
}

namespace {

/// (..., seq, embed) -> (..., num_heads, seq, head_dim), differentiable.
at::Tensor split_heads(const at::Tensor& merged, std::int64_t num_heads) {
  c10::SymDimVector sizes(merged.sym_sizes().begin(), merged.sym_sizes().end());
  sizes.push_back(sizes.back() / num_heads);
  sizes[sizes.size() - 2] = num_heads;
  return merged.reshape_symint(sizes).transpose(-3, -2);
}

/// And back.
at::Tensor merge_heads(const at::Tensor& heads) {
  const at::Tensor split = heads.transpose(-3, -2);
  c10::SymDimVector sizes(split.sym_sizes().begin(), split.sym_sizes().end() - 1);
  sizes.back() = sizes.back() * split.sym_size(-1);
  return split.reshape_symint(sizes);
}

struct Parts {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
};

Parts split_packed(const at::Tensor& qkv, std::int64_t num_heads) {
  const c10::SymInt embed = qkv.sym_size(-1) / 3;
  const auto part = [&](std::int64_t index) {
    return split_heads(qkv.narrow_symint(-1, embed * index, embed), num_heads);
  };
  return {part(0), part(1), part(2)};
}

}  // namespace

ForwardResult decomposed_packed_forward(const at::Tensor& qkv, std::int64_t num_heads,
                                        const OptionalTensor& attn_mask, double dropout_p,
                                        bool is_causal, const OptionalTensor& key_padding_mask,
                                        const OptionalTensor& dropout_seed) {
  check_packed_qkv<c10::SymInt>("packed_attention_forward", qkv, num_heads);
  const Parts parts = split_packed(qkv, num_heads);
  auto [out, logsumexp] = call_attention_forward(
      parts.query, parts.key, parts.value, attn_mask, dropout_p, is_causal, /*scale=*/std::nullopt,
      /*enable_gqa=*/false, /*causal_offset=*/0, key_padding_mask, dropout_seed,
      /*contiguous=*/false);
  return {merge_heads(out), logsumexp};
}

PackedBackwardResult decomposed_packed_backward(
    const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
    std::int64_t num_heads, const at::Tensor& out, const at::Tensor& logsumexp,
    const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
    const OptionalTensor& key_padding_mask, const OptionalTensor& dropout_seed,
    std::array<bool, 2> output_mask) {
  check_packed_qkv<c10::SymInt>("packed_attention_backward", qkv, num_heads);
  const Parts parts = split_packed(qkv, num_heads);
  const bool wanted = output_mask[0];
  auto [grad_query, grad_key, grad_value, grad_mask] = call_attention_backward(
      split_heads(grad_out, num_heads), grad_logsumexp, parts.query, parts.key, parts.value,
      split_heads(out, num_heads), logsumexp, attn_mask, dropout_p, is_causal,
      /*scale=*/std::nullopt, /*enable_gqa=*/false, /*causal_offset=*/0, key_padding_mask,
      dropout_seed, {wanted, wanted, wanted, output_mask[1]}, /*contiguous=*/false);
  at::Tensor grad_qkv;
  if (wanted) {
    grad_qkv =
        at::cat({merge_heads(grad_query), merge_heads(grad_key), merge_heads(grad_value)}, -1);
  }
  return {grad_qkv, grad_mask};
}

}  // namespace torch_ext
