// The model: a character-level transformer in plain LibTorch, whose attention is handed in.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "sums.h"

inline constexpr int64_t kBatch = 8;
inline constexpr int64_t kEmbed = 64;
inline constexpr int64_t kHeads = 4;
inline constexpr int64_t kLayers = 2;
inline constexpr double kLearningRate = 3e-3;

/// Causal attention over (batch, heads, seq, head_dim).
using Attention =
    std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&)>;

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(Attention attention)
      : attention(std::move(attention)),
        attention_norm(register_module("attention_norm", norm())),
        qkv(register_module("qkv", torch::nn::Linear(kEmbed, 3 * kEmbed))),
        projection(register_module("projection", torch::nn::Linear(kEmbed, kEmbed))),
        mlp_norm(register_module("mlp_norm", norm())),
        expand(register_module("expand", torch::nn::Linear(kEmbed, 4 * kEmbed))),
        contract(register_module("contract", torch::nn::Linear(4 * kEmbed, kEmbed))) {}

  static torch::nn::LayerNorm norm() {
    return torch::nn::LayerNorm(torch::nn::LayerNormOptions({kEmbed}));
  }

  torch::Tensor forward(torch::Tensor x) {  // (batch, seq, embed)
    const int64_t seq = x.size(1);
    // (3, batch, heads, seq, head_dim), not copied: the kernels read any strides.
    const torch::Tensor heads = qkv(attention_norm(x))
                                    .view({x.size(0), seq, 3, kHeads, kEmbed / kHeads})
                                    .permute({2, 0, 3, 1, 4});
    const torch::Tensor mixed = attention(heads[0], heads[1], heads[2]);
    x = x + projection(mixed.transpose(1, 2).reshape({x.size(0), seq, kEmbed}));
    return x + contract(torch::gelu(expand(mlp_norm(x))));
  }

  Attention attention;
  torch::nn::LayerNorm attention_norm;
  torch::nn::Linear qkv, projection;
  torch::nn::LayerNorm mlp_norm;
  torch::nn::Linear expand, contract;
};
TORCH_MODULE(Block);

struct TransformerImpl : torch::nn::Module {
  TransformerImpl(const Attention& attention, int64_t seq_len)
      : characters(register_module("characters", torch::nn::Embedding(kAlphabet.size(), kEmbed))),
        positions(register_module("positions", torch::nn::Embedding(seq_len, kEmbed))),
        norm(register_module("norm", BlockImpl::norm())),
        head(register_module("head", torch::nn::Linear(kEmbed, kAlphabet.size()))) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      blocks.push_back(register_module("block" + std::to_string(layer), Block(attention)));
    }
  }

  torch::Tensor forward(const torch::Tensor& text) {  // (batch, seq), int64
    torch::Tensor x = characters(text) + positions(torch::arange(text.size(1)));
    for (Block& block : blocks) x = block(x);
    return head(norm(x));  // (batch, seq, alphabet)
  }

  torch::nn::Embedding characters, positions;
  torch::nn::LayerNorm norm;
  torch::nn::Linear head;
  std::vector<Block> blocks;
};
TORCH_MODULE(Transformer);

/// (batch, seq + 1), another one for every step.
inline torch::Tensor batch_of_text(int64_t step, int64_t seq_len) {
  const std::string text =
      sums(static_cast<std::size_t>(kBatch * (seq_len + 1)), static_cast<unsigned>(step) + 1);
  torch::Tensor batch = torch::empty({kBatch, seq_len + 1}, torch::kInt64);
  int64_t* const out = batch.data_ptr<int64_t>();
  for (int64_t i = 0; i < batch.numel(); ++i) {
    out[i] = static_cast<int64_t>(kAlphabet.find(text[static_cast<std::size_t>(i)]));
  }
  return batch;
}
