#include "packed_attention.h"

#include <ATen/ops/cat.h>
#include <c10/core/SymbolicShapeMeta.h>

#include "attention_signature.h"
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

namespace {

template <typename Int>
AttentionGeometry<Int> check_packed_qkv(const char* op, const PackedProjection& packed) {
  const at::Tensor& qkv = *packed.qkv;
  const std::int64_t num_heads = packed.num_heads;
  check_tensor_kind(op, "qkv", qkv);
  TORCH_CHECK(qkv.dim() == 2 || qkv.dim() == 3, "torch_ext::", op,
              ": qkv takes (batch, seq, 3 * embed) or (seq, 3 * embed), got ", qkv.sym_sizes());
  const auto sizes = sizes_of<Int>(qkv);
  TORCH_CHECK(num_heads > 0, "torch_ext::", op, ": num_heads takes a positive number, got ",
              num_heads);
  const Int& width = sizes.back();
  TORCH_CHECK(equal(width % Int(3 * num_heads), Int(0)), "torch_ext::", op,
              ": qkv takes a last dimension that 3 * num_heads, ", 3 * num_heads, ", divides, got ",
              width);
  return packed_geometry<Int>(sizes.slice(0, sizes.size() - 1), num_heads,
                              width / Int(3 * num_heads));
}

}  // namespace

AttentionArguments over_qkv(const PackedProjection& packed, const AttentionArguments& options) {
  AttentionArguments arguments = options;
  arguments.query = arguments.key = arguments.value = packed.qkv;
  return arguments;
}

template <typename Int>
AttentionGeometry<Int> check_packed_attention(const char* op, const PackedProjection& packed,
                                              const AttentionArguments& options) {
  auto geometry = check_packed_qkv<Int>(op, packed);
  check_attention_options(op, over_qkv(packed, options), geometry, SeedArgument::kRequired);
  return geometry;
}

template AttentionGeometry<std::int64_t> check_packed_attention(const char*,
                                                                const PackedProjection&,
                                                                const AttentionArguments&);
template AttentionGeometry<c10::SymInt> check_packed_attention(const char*, const PackedProjection&,
                                                               const AttentionArguments&);

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

AttentionArguments HeadViews::arguments(const AttentionArguments& options) const {
  AttentionArguments arguments = options;
  arguments.query = &query_;
  arguments.key = &key_;
  arguments.value = &value_;
  return arguments;
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

/// query, key and value as differentiable views of their own.
class Parts {
 public:
  explicit Parts(const PackedProjection& packed) {
    const c10::SymInt embed = packed.qkv->sym_size(-1) / 3;
    for (std::int64_t part = 0; part < 3; ++part) {
      heads_[part] =
          split_heads(packed.qkv->narrow_symint(-1, embed * part, embed), packed.num_heads);
    }
  }

  /// Refers to this object.
  AttentionArguments arguments(const AttentionArguments& options) const {
    AttentionArguments arguments = options;
    arguments.query = &heads_[0];
    arguments.key = &heads_[1];
    arguments.value = &heads_[2];
    return arguments;
  }

 private:
  std::array<at::Tensor, 3> heads_;
};

}  // namespace

ForwardResult DecomposedAttention::packed_forward(const PackedProjection& packed,
                                                  const AttentionArguments& options) {
  check_packed_qkv<c10::SymInt>("packed_attention_forward", packed);
  const Parts parts(packed);
  auto [out, logsumexp] = call_attention_forward(parts.arguments(options));
  return {merge_heads(out), logsumexp};
}

PackedBackwardResult DecomposedAttention::packed_backward(const PackedProjection& packed,
                                                          const AttentionArguments& options,
                                                          const AttentionGradients& gradients) {
  check_packed_qkv<c10::SymInt>("packed_attention_backward", packed);
  const Parts parts(packed);
  const at::Tensor grad_out = split_heads(*gradients.grad_out, packed.num_heads);
  const at::Tensor out = split_heads(*gradients.out, packed.num_heads);
  AttentionGradients of_heads = gradients;
  of_heads.grad_out = &grad_out;
  of_heads.out = &out;
  auto [grad_query, grad_key, grad_value, grad_mask, grad_sink] =
      call_attention_backward(parts.arguments(options), of_heads);
  at::Tensor grad_qkv;
  if (gradients.output_mask[kQuery]) {
    grad_qkv =
        at::cat({merge_heads(grad_query), merge_heads(grad_key), merge_heads(grad_value)}, -1);
  }
  return {grad_qkv, grad_mask, grad_sink};
}

}  // namespace torch_ext
