// Shapes of packed_attention_forward and packed_attention_backward without data.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/SymbolicShapeMeta.h>
#include <torch/library.h>

#include "attention_backward_outputs.h"
#include "attention_signature.h"
#include "packed_attention.h"

namespace torch_ext {
namespace {

struct MetaPackedAttention {
  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options) {
    const auto geometry =
        check_packed_attention<c10::SymInt>("packed_attention_forward", packed, options);
    const at::Tensor& qkv = *packed.qkv;
    c10::SymDimVector sizes(qkv.sym_sizes().begin(), qkv.sym_sizes().end());
    sizes.back() = geometry.head_dim * packed.num_heads;
    return {at::empty_symint(sizes, qkv.options()),
            at::empty_symint(geometry.logsumexp_sizes(),
                             qkv.options().dtype(accumulate_type(qkv.scalar_type())))};
  }

  static PackedBackwardResult packed_backward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGradients& gradients) {
    constexpr const char* kOp = "packed_attention_backward";
    const auto geometry = check_packed_attention<c10::SymInt>(kOp, packed, options);
    const at::Tensor& qkv = *packed.qkv;
    check_packed_out(kOp, "grad_out", *gradients.grad_out, qkv, /*any_type=*/true);
    check_packed_out(kOp, "out", *gradients.out, qkv, /*any_type=*/false);
    const AttentionArguments arguments = over_qkv(packed, options);
    const AttentionGradientOutputs outputs =
        attention_gradient_outputs(arguments, without_qkv(gradients.output_mask), geometry);
    at::Tensor grad_qkv;
    if (gradients.output_mask[kQuery]) grad_qkv = at::empty_like(qkv);
    return {grad_qkv, mask_gradient(arguments, outputs), sink_gradient(arguments, outputs)};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Meta, m) {
  m.impl("packed_attention_forward",
         TORCH_FN(packed_attention_forward_kernel<MetaPackedAttention>));
  m.impl("packed_attention_backward",
         TORCH_FN(packed_attention_backward_kernel<MetaPackedAttention>));
}

}  // namespace torch_ext
