#include "micro_batch_training.h"

#include <torch_ext/torch_ext.h>

#include <memory>
#include <sstream>

namespace {

/// Sequences of each micro-batch; kBatch in all. The step is that of one batch whatever they are.
const std::vector<int64_t> kMicroBatches{3, 1, 2, 2};

/// Model, optimizer and accumulator, which save and load together.
struct Training {
  Training(const Attention& attention, int64_t seq_len)
      : model(attention, seq_len),
        optimizer(model->parameters(), torch::optim::AdamWOptions(kLearningRate)),
        accumulator(model->parameters()) {}

  /// Returns the summed loss.
  double micro_batch(const torch::Tensor& text, int64_t seq_len) {
    const torch::Tensor targets = text.slice(1, 1).reshape({-1});
    const auto scope = accumulator.micro_batch(static_cast<double>(targets.numel()));
    const torch::Tensor loss = torch::nn::functional::cross_entropy(
        model(text.slice(1, 0, seq_len)).flatten(0, 1), targets,
        torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kSum));
    loss.backward();
    return loss.item<double>();
  }

  /// A half-full window is part of the checkpoint. To files it is torch::save(..., "name.pt").
  void save(std::ostream& saved_model, std::ostream& saved_optimizer, std::ostream& window) const {
    torch::save(model, saved_model);
    torch::save(optimizer, saved_optimizer);
    torch::save(accumulator, window);
  }

  void load(std::istream& saved_model, std::istream& saved_optimizer, std::istream& window) {
    torch::load(model, saved_model);
    torch::load(optimizer, saved_optimizer);
    torch::load(accumulator, window);
  }

  Transformer model;
  torch::optim::AdamW optimizer;
  torch_ext::GradientAccumulator accumulator;
};

}  // namespace

std::vector<double> train_in_micro_batches(const Attention& attention, int64_t steps,
                                           int64_t seq_len) {
  torch::manual_seed(20);
  auto training = std::make_unique<Training>(attention, seq_len);
  std::vector<double> losses;
  for (int64_t step = 0; step < steps; ++step) {
    const std::vector<torch::Tensor> parts =
        batch_of_text(step, seq_len).split_with_sizes(kMicroBatches);
    double loss = 0;
    for (std::size_t part = 0; part < parts.size(); ++part) {
      if (step == steps / 2 && part == 2) {
        std::stringstream saved_model, saved_optimizer, window;
        training->save(saved_model, saved_optimizer, window);
        training = std::make_unique<Training>(attention, seq_len);
        training->load(saved_model, saved_optimizer, window);
      }
      loss += training->micro_batch(parts[part], seq_len);
    }
    training->accumulator.step(training->optimizer);
    losses.push_back(loss / static_cast<double>(kBatch * seq_len));
  }
  return losses;
}
