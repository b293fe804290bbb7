// Attention over a packed projection: qkv is (batch, seq, 3 * embed) or (seq, 3 * embed), with
// query, key and value one behind the other, each (num_heads, head_dim) in itself.
#pragma once

#include "attention_arguments.h"
#include "attention_checks.h"

namespace torch_ext {

/// The options over qkv in place of query, key and value: for what looks at dtype and device only.
AttentionArguments over_qkv(const PackedProjection& packed, const AttentionArguments& options);

/// Checks qkv, num_heads and the options.
template <typename Int>
AttentionGeometry<Int> check_packed_attention(const char* op, const PackedProjection& packed,
                                              const AttentionArguments& options);

extern template AttentionGeometry<std::int64_t> check_packed_attention(const char*,
                                                                       const PackedProjection&,
                                                                       const AttentionArguments&);
extern template AttentionGeometry<c10::SymInt> check_packed_attention(const char*,
                                                                      const PackedProjection&,
                                                                      const AttentionArguments&);

/// (batch, seq, embed) beside qkv (batch, seq, 3 * embed), in its dtype and on its device.
void check_packed_out(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& qkv, bool any_type);

/// Geometry of self-attention among `num_heads` heads, from checked sizes.
template <typename Int>
AttentionGeometry<Int> packed_geometry(c10::ArrayRef<Int> leading_sizes, std::int64_t num_heads,
                                       const Int& head_dim);

/// (batch, num_heads, seq, head_dim) of part `part`, 0 = query, of (batch, seq, parts * embed): the
/// same memory. Below autograd.
at::Tensor head_view(const at::Tensor& packed, std::int64_t part,
                     const AttentionGeometry<std::int64_t>& geometry);

/// Query, key and value of a packed projection, where they lie in it.
class HeadViews {
 public:
  HeadViews(const at::Tensor& qkv, const AttentionGeometry<std::int64_t>& geometry)
      : query_(head_view(qkv, 0, geometry)),
        key_(head_view(qkv, 1, geometry)),
        value_(head_view(qkv, 2, geometry)) {}

  /// Refers to this object.
  AttentionArguments arguments(const AttentionArguments& options) const;

 private:
  at::Tensor query_;
  at::Tensor key_;
  at::Tensor value_;
};

/// The gradients that are no part of qkv's.
inline GradientSet without_qkv(GradientSet wanted) {
  wanted[kQuery] = wanted[kKey] = wanted[kValue] = false;
  return wanted;
}

/// packed_attention_forward and packed_attention_backward by way of attention_forward and
/// attention_backward and differentiable views: one concatenation more, for where a second
/// derivative or a transform is at work.
struct DecomposedAttention {
  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options);
  static PackedBackwardResult packed_backward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGradients& gradients);
};

}  // namespace torch_ext
