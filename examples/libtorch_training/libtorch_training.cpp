// Trains a tiny character-level transformer three times from one seed: with LibTorch's own
// attention, with the same code under torch_ext::enable(), and calling torch_ext itself. The losses
// agree; the times do not.
//
//   libtorch_training [steps] [sequence length]
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "sums.h"

namespace {

constexpr int64_t kBatch = 8;
constexpr int64_t kEmbed = 64;
constexpr int64_t kHeads = 4;
constexpr int64_t kLayers = 2;
constexpr double kLearningRate = 3e-3;

/// Causal attention over (batch, heads, seq, head_dim).
using Attention =
    std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&, const torch::Tensor&)>;

torch::Tensor libtorch_attention(const torch::Tensor& query, const torch::Tensor& key,
                                 const torch::Tensor& value) {
  return torch::scaled_dot_product_attention(query, key, value, /*attn_mask=*/{},
                                             /*dropout_p=*/0.0, /*is_causal=*/true);
}

torch::Tensor torch_ext_attention(const torch::Tensor& query, const torch::Tensor& key,
                                  const torch::Tensor& value) {
  return torch_ext::scaled_dot_product_attention(query, key, value, /*attn_mask=*/{},
                                                 /*dropout_p=*/0.0, /*is_causal=*/true);
}

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
torch::Tensor batch_of_text(int64_t step, int64_t seq_len) {
  const std::string text =
      sums(static_cast<std::size_t>(kBatch * (seq_len + 1)), static_cast<unsigned>(step) + 1);
  torch::Tensor batch = torch::empty({kBatch, seq_len + 1}, torch::kInt64);
  int64_t* const out = batch.data_ptr<int64_t>();
  for (int64_t i = 0; i < batch.numel(); ++i) {
    out[i] = static_cast<int64_t>(kAlphabet.find(text[static_cast<std::size_t>(i)]));
  }
  return batch;
}

struct Run {
  std::vector<double> losses;
  double seconds_per_step = 0;
};

Run train(const Attention& attention, int64_t steps, int64_t seq_len) {
  torch::manual_seed(20);
  Transformer model(attention, seq_len);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(kLearningRate));
  Run run;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t step = 0; step < steps; ++step) {
    const torch::Tensor text = batch_of_text(step, seq_len);
    const torch::Tensor logits = model(text.slice(1, 0, seq_len));
    const torch::Tensor loss =
        torch::nn::functional::cross_entropy(logits.flatten(0, 1), text.slice(1, 1).reshape({-1}));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    run.losses.push_back(loss.item<double>());
  }
  run.seconds_per_step =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
      static_cast<double>(steps);
  return run;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t steps = argc > 1 ? std::atoll(argv[1]) : 60;
  const int64_t seq_len = argc > 2 ? std::atoll(argv[2]) : 256;
  if (steps < 2 || seq_len < 1 || argc > 3) {
    std::fprintf(stderr, "usage: libtorch_training [steps, at least 2] [sequence length]\n");
    return 2;
  }

  const Run stock = train(libtorch_attention, steps, seq_len);
  Run dropped_in;
  {
    const torch_ext::EnabledScope enabled;
    dropped_in = train(libtorch_attention, steps, seq_len);
  }
  const Run called = train(torch_ext_attention, steps, seq_len);

  std::printf("%8s %12s %12s %12s\n", "step", "LibTorch", "enable()", "torch_ext");
  double largest_difference = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const auto i = static_cast<std::size_t>(step);
    largest_difference =
        std::max({largest_difference, std::abs(dropped_in.losses[i] - stock.losses[i]),
                  std::abs(called.losses[i] - stock.losses[i])});
    if (step % std::max<int64_t>(1, steps / 6) == 0 || step == steps - 1) {
      std::printf("%8lld %12.4f %12.4f %12.4f\n", static_cast<long long>(step), stock.losses[i],
                  dropped_in.losses[i], called.losses[i]);
    }
  }
  std::printf("%8s %12.2f %12.2f %12.2f\n", "ms/step", 1e3 * stock.seconds_per_step,
              1e3 * dropped_in.seconds_per_step, 1e3 * called.seconds_per_step);
  std::printf("largest difference of losses %.2g, path %s\n", largest_difference,
              torch_ext::last_attention_path());

  const bool learned = called.losses.back() < 0.8 * called.losses.front();
  const bool agree = largest_difference < 0.02;
  if (!learned) std::fprintf(stderr, "the loss did not go down\n");
  if (!agree) std::fprintf(stderr, "the losses do not agree\n");
  return learned && agree ? 0 : 1;
}
