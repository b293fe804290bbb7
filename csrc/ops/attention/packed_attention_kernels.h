// packed_attention_forward and packed_attention_backward on any device that has attention kernels:
// they read and write the packed tensors in place.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "attention_backward_outputs.h"
#include "packed_attention.h"

namespace torch_ext {

/// kRunForward, kRunBackward: run_attention_forward_cpu and run_attention_backward_cpu, or another
/// device's.
template <auto kRunForward, auto kRunBackward>
struct PackedAttentionKernels {
  /// Checks, named `op`, and computes. Writes `*logsumexp` where it is not null.
  static at::Tensor run_forward(const char* op, const at::Tensor& qkv, std::int64_t num_heads,
                                const at::Tensor* attn_mask, double dropout_p, bool is_causal,
                                const at::Tensor* key_padding_mask, const at::Tensor* dropout_seed,
                                at::Tensor* logsumexp) {
    const auto geometry = check_packed_qkv<std::int64_t>(op, qkv, num_heads);
    const at::Tensor query = head_view(qkv, 0, geometry);
    const at::Tensor key = head_view(qkv, 1, geometry);
    const at::Tensor value = head_view(qkv, 2, geometry);
    const AttentionArguments arguments{.query = query,
                                       .key = key,
                                       .value = value,
                                       .attn_mask = attn_mask,
                                       .dropout_p = dropout_p,
                                       .is_causal = is_causal,
                                       .key_padding_mask = key_padding_mask,
                                       .dropout_seed = dropout_seed};
    check_attention_options(op, arguments, geometry, SeedArgument::kRequired);
    c10::SmallVector<std::int64_t, 3> sizes(qkv.sizes().begin(), qkv.sizes().end());
    sizes.back() /= 3;
    at::Tensor out = at::empty(sizes, qkv.options());
    if (logsumexp != nullptr) {
      *logsumexp = at::empty(geometry.logsumexp_sizes(),
                             qkv.options().dtype(accumulate_type(qkv.scalar_type())));
    }
    kRunForward(arguments, /*causal_offset=*/0, geometry, head_view(out, 0, geometry), logsumexp);
    return out;
  }

  static ForwardResult forward(const at::Tensor& qkv, std::int64_t num_heads,
                               const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                               const OptionalTensor& key_padding_mask,
                               const OptionalTensor& dropout_seed) {
    at::Tensor logsumexp;
    at::Tensor out =
        run_forward("packed_attention_forward", qkv, num_heads, given(attn_mask), dropout_p,
                    is_causal, given(key_padding_mask), given(dropout_seed), &logsumexp);
    return {std::move(out), std::move(logsumexp)};
  }

  static PackedBackwardResult backward(const at::Tensor& grad_out,
                                       const OptionalTensor& grad_logsumexp, const at::Tensor& qkv,
                                       std::int64_t num_heads, const at::Tensor& out,
                                       const at::Tensor& logsumexp, const OptionalTensor& attn_mask,
                                       double dropout_p, bool is_causal,
                                       const OptionalTensor& key_padding_mask,
                                       const OptionalTensor& dropout_seed,
                                       std::array<bool, 2> output_mask) {
    constexpr const char* kOp = "packed_attention_backward";
    const auto geometry = check_packed_qkv<std::int64_t>(kOp, qkv, num_heads);
    check_packed_out(kOp, "grad_out", grad_out, qkv, /*any_type=*/true);
    check_packed_out(kOp, "out", out, qkv, /*any_type=*/false);
    const at::Tensor query = head_view(qkv, 0, geometry);
    const at::Tensor key = head_view(qkv, 1, geometry);
    const at::Tensor value = head_view(qkv, 2, geometry);
    const AttentionArguments arguments{.query = query,
                                       .key = key,
                                       .value = value,
                                       .attn_mask = given(attn_mask),
                                       .dropout_p = dropout_p,
                                       .is_causal = is_causal,
                                       .key_padding_mask = given(key_padding_mask),
                                       .dropout_seed = given(dropout_seed)};
    const bool wanted = output_mask[0];
    const std::array<bool, 4> outputs_wanted{wanted, wanted, wanted, output_mask[1]};
    const at::Tensor grad_out_heads = head_view(grad_out, 0, geometry);
    const at::Tensor out_heads = head_view(out, 0, geometry);
    const AttentionGradients gradients{.grad_out = grad_out_heads,
                                       .grad_logsumexp = given(grad_logsumexp),
                                       .out = out_heads,
                                       .logsumexp = logsumexp,
                                       .output_mask = outputs_wanted};
    check_attention_options(kOp, arguments, geometry, SeedArgument::kRequired);
    check_attention_gradients(kOp, arguments, gradients, geometry);
    at::Tensor grad_qkv;
    AttentionGradientOutputs outputs =
        attention_gradient_outputs(arguments, {false, false, false, output_mask[1]}, geometry);
    if (wanted) {
      grad_qkv = at::empty_like(qkv);
      outputs.query = head_view(grad_qkv, 0, geometry);
      outputs.key = head_view(grad_qkv, 1, geometry);
      outputs.value = head_view(grad_qkv, 2, geometry);
    }
    if (wanted || output_mask[1]) {
      kRunBackward(arguments, /*causal_offset=*/0, gradients, geometry, outputs);
    }
    return {grad_qkv, mask_gradient(arguments, outputs)};
  }
};

}  // namespace torch_ext
