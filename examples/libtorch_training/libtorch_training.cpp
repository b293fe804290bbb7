// Trains a tiny character-level transformer four times from one seed: with LibTorch's own
// attention, with the same code under torch_ext::enable(), calling torch_ext itself, and with each
// batch in micro-batches (micro_batch_training.h). The losses agree; the times do not.
//
//   libtorch_training [steps] [sequence length]
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "micro_batch_training.h"
#include "transformer.h"

namespace {

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
  const std::vector<double> accumulated =
      train_in_micro_batches(torch_ext_attention, steps, seq_len);

  std::printf("%8s %12s %12s %12s %14s\n", "step", "LibTorch", "enable()", "torch_ext",
              "micro-batches");
  double largest_difference = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const auto i = static_cast<std::size_t>(step);
    largest_difference = std::max(
        {largest_difference, std::abs(dropped_in.losses[i] - stock.losses[i]),
         std::abs(called.losses[i] - stock.losses[i]), std::abs(accumulated[i] - stock.losses[i])});
    if (step % std::max<int64_t>(1, steps / 6) == 0 || step == steps - 1) {
      std::printf("%8lld %12.4f %12.4f %12.4f %14.4f\n", static_cast<long long>(step),
                  stock.losses[i], dropped_in.losses[i], called.losses[i], accumulated[i]);
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
