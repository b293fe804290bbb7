// Arguments -> kernel params, on every device.
#pragma once

#include "../../kernels/attention_params.h"
#include "attention_arguments.h"

namespace torch_ext {

/// What both passes share.
AttentionShape attention_shape(const AttentionGeometry<std::int64_t>& geometry);
ScoreTransform score_transform(const AttentionArguments& arguments,
                               const AttentionGeometry<std::int64_t>& geometry);
AttentionDropout attention_dropout(const AttentionArguments& arguments);

/// No pair of a query and a key exists: out is 0, logsumexp -inf and every gradient 0.
bool has_no_scores(const AttentionGeometry<std::int64_t>& geometry);

AttentionForwardParams forward_params(const AttentionArguments& arguments,
                                      const AttentionGeometry<std::int64_t>& geometry,
                                      const at::Tensor& out, const at::Tensor* logsumexp);

}  // namespace torch_ext
