// Arguments -> kernel params, on every device.
#pragma once

#include "../../kernels/attention_params.h"
#include "attention_arguments.h"
#include "attention_backward_outputs.h"

namespace torch_ext {

/// What both passes share. sink: of kernel_sink(), which has to outlive the params.
AttentionShape attention_shape(const AttentionGeometry<std::int64_t>& geometry);
ScoreTransform score_transform(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& sink);
AttentionDropout attention_dropout(const AttentionArguments& arguments);

/// The sink as the kernels read it: contiguous, of logsumexp's type. Undefined where there is none.
at::Tensor kernel_sink(const AttentionArguments& arguments);

/// No pair of a query and a key exists.
bool has_no_scores(const AttentionGeometry<std::int64_t>& geometry);

/// The results of such a call: out is 0, logsumexp -inf or the sink, and every gradient 0, but that
/// logsumexp hands its own to the sink.
void write_no_scores(const AttentionArguments& arguments, const at::Tensor& out,
                     const at::Tensor* logsumexp);
void write_no_score_gradients(const AttentionGradients& gradients,
                              const AttentionGeometry<std::int64_t>& geometry,
                              const AttentionGradientOutputs& outputs);

AttentionForwardParams forward_params(const AttentionArguments& arguments,
                                      const AttentionGeometry<std::int64_t>& geometry,
                                      const at::Tensor& sink, const at::Tensor& out,
                                      const at::Tensor* logsumexp);

}  // namespace torch_ext
