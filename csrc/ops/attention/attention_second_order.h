// The gradient of attention_backward(), written out.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "attention_autograd.h"

namespace torch_ext {

/// Arguments of attention_backward(); undefined where absent.
struct SecondOrderInputs {
  const at::Tensor& grad_out;
  const at::Tensor& grad_logsumexp;
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const at::Tensor& attn_mask;
  const at::Tensor& key_padding_mask;
  const at::Tensor& dropout_seed;
  const AttentionOptions& options;
};

/// Gradients of its results; undefined where zero.
struct SecondOrderGradients {
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const at::Tensor& attn_mask;
};

/// Gradients of grad_out, grad_logsumexp, query, key, value and attn_mask; undefined where not
/// needed. Computes the weights explicitly, (batch..., heads, q_len, kv_len) at once, from
/// differentiable aten operators.
std::vector<at::Tensor> attention_second_order(const SecondOrderInputs& inputs,
                                               const SecondOrderGradients& gradients,
                                               const std::array<bool, 6>& needs_grad);

}  // namespace torch_ext
