// The operators on a device that has kernels: check, allocate, run. CPU and CUDA differ in the
// run_... functions alone.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "attention_backward_outputs.h"
#include "attention_checks.h"
#include "attention_layout.h"
#include "packed_attention.h"

namespace torch_ext {

/// kRunForward, kRunBackward: run_attention_forward_cpu and run_attention_backward_cpu, or another
/// device's.
template <auto kRunForward, auto kRunBackward>
struct DeviceAttention {
  using Geometry = AttentionGeometry<std::int64_t>;

  static ForwardResult forward(const AttentionArguments& arguments) {
    return forward(arguments, check_attention<std::int64_t>("attention_forward", arguments,
                                                            SeedArgument::kRequired));
  }

  /// Of checked arguments.
  static ForwardResult forward(const AttentionArguments& arguments, const Geometry& geometry) {
    at::Tensor out = attention_out(arguments, geometry);
    at::Tensor logsumexp = empty_logsumexp(*arguments.query, geometry);
    kRunForward(arguments, geometry, out, &logsumexp);
    return {std::move(out), std::move(logsumexp)};
  }

  static BackwardResult backward(const AttentionArguments& arguments,
                                 const AttentionGradients& gradients) {
    constexpr const char* kOp = "attention_backward";
    const auto geometry = check_attention<std::int64_t>(kOp, arguments, SeedArgument::kRequired);
    check_attention_gradients(kOp, arguments, gradients, geometry);
    const AttentionGradientOutputs outputs =
        attention_gradient_outputs(arguments, gradients.output_mask, geometry);
    if (gradients.output_mask != GradientSet{}) {
      kRunBackward(arguments, gradients, geometry, outputs);
    }
    return reduced_gradients(arguments, outputs);
  }

  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options) {
    constexpr const char* kOp = "packed_attention_forward";
    const auto geometry = check_packed_attention<std::int64_t>(kOp, packed, options);
    return packed_forward(packed, options, geometry);
  }

  /// Of checked arguments.
  static ForwardResult packed_forward(const PackedProjection& packed,
                                      const AttentionArguments& options, const Geometry& geometry) {
    at::Tensor logsumexp = empty_logsumexp(*packed.qkv, geometry);
    at::Tensor out = packed_out(packed, options, geometry, &logsumexp);
    return {std::move(out), std::move(logsumexp)};
  }

  /// Of checked arguments. `logsumexp` is null where it is not wanted.
  static at::Tensor packed_out(const PackedProjection& packed, const AttentionArguments& options,
                               const Geometry& geometry, const at::Tensor* logsumexp) {
    const HeadViews views(*packed.qkv, geometry);
    c10::SmallVector<std::int64_t, 3> sizes(packed.qkv->sizes().begin(), packed.qkv->sizes().end());
    sizes.back() /= 3;
    at::Tensor out = at::empty(sizes, packed.qkv->options());
    kRunForward(views.arguments(options), geometry, head_view(out, 0, geometry), logsumexp);
    return out;
  }

  static PackedBackwardResult packed_backward(const PackedProjection& packed,
                                              const AttentionArguments& options,
                                              const AttentionGradients& gradients) {
    constexpr const char* kOp = "packed_attention_backward";
    const auto geometry = check_packed_attention<std::int64_t>(kOp, packed, options);
    check_packed_out(kOp, "grad_out", *gradients.grad_out, *packed.qkv, /*any_type=*/true);
    check_packed_out(kOp, "out", *gradients.out, *packed.qkv, /*any_type=*/false);
    const HeadViews views(*packed.qkv, geometry);
    const AttentionArguments arguments = views.arguments(options);
    const at::Tensor grad_out = head_view(*gradients.grad_out, 0, geometry);
    const at::Tensor out = head_view(*gradients.out, 0, geometry);
    AttentionGradients of_heads = gradients;
    of_heads.grad_out = &grad_out;
    of_heads.out = &out;
    check_attention_gradients(kOp, arguments, of_heads, geometry);
    at::Tensor grad_qkv;
    AttentionGradientOutputs outputs =
        attention_gradient_outputs(arguments, without_qkv(gradients.output_mask), geometry);
    if (gradients.output_mask[kQuery]) {
      grad_qkv = at::empty_like(*packed.qkv);
      outputs.query = head_view(grad_qkv, 0, geometry);
      outputs.key = head_view(grad_qkv, 1, geometry);
      outputs.value = head_view(grad_qkv, 2, geometry);
    }
    if (gradients.output_mask != GradientSet{}) {
      kRunBackward(arguments, of_heads, geometry, outputs);
    }
    return {grad_qkv, mask_gradient(arguments, outputs), sink_gradient(arguments, outputs)};
  }

 private:
  static at::Tensor empty_logsumexp(const at::Tensor& query, const Geometry& geometry) {
    return at::empty(geometry.logsumexp_sizes(),
                     query.options().dtype(accumulate_type(query.scalar_type())));
  }
};

}  // namespace torch_ext
