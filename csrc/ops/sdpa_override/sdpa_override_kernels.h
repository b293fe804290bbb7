// The overriding kernels, by what they override. Each adds itself to a library that the switch
// owns; destroying the library restores torch's kernels.
#pragma once

#include <ATen/ops/_native_multi_head_attention_native.h>
#include <torch/library.h>

#include <vector>

namespace torch_ext {

/// aten::scaled_dot_product_attention at the dense keys and their Autograd keys.
void override_attention(std::vector<torch::Library>& libraries);

/// aten::_native_multi_head_attention at the dense and nested keys: what the inference fast paths
/// of nn.MultiheadAttention, nn.TransformerEncoderLayer and nn.TransformerEncoder end in.
void override_multi_head_attention(std::vector<torch::Library>& libraries);

/// aten::_flash_attention_forward, its form in place and its backward, at the CPU key: what
/// torch.nn.attention.varlen ends in.
void override_varlen_attention(std::vector<torch::Library>& libraries);

/// torch's own kernel of aten::_native_multi_head_attention on CUDA devices, where a call stays
/// torch's. Set by sdpa_override_multi_head_cuda.cpp, which only a build with CUDA has; else null.
using TorchMultiHeadAttention = decltype(&at::native::native_multi_head_attention_cpu);
extern TorchMultiHeadAttention torch_cuda_multi_head_attention;

}  // namespace torch_ext
