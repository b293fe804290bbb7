// Several models, several optimizers, and micro-batches that are kept apart until they end.
#include <vector>

#include "two_layers.h"

namespace torch_ext {
namespace {

torch::optim::SGDOptions sgd() { return torch::optim::SGDOptions(0.3); }

TEST(GradientAccumulatorSeveral, OptimizersShareAModel) {
  const std::vector<at::Tensor> batches = micro_batches();
  // Both fused, or one of them through .grad.
  for (const auto& make : {maker<torch::optim::AdamW>(torch::optim::AdamWOptions(1e-2)),
                           maker<torch::optim::RMSprop>(torch::optim::RMSpropOptions(1e-3))}) {
    std::vector<TwoLayers> models;
    for (const at::ScalarType dtype : {at::kFloat, at::kFloat, at::kDouble}) {
      models.push_back(model_of(1, dtype));
      TwoLayers& model = models.back();
      torch::optim::SGD biases({model->first->bias, model->second->bias}, sgd());
      const auto matrices = make({model->first->weight, model->second->weight});
      GradientAccumulator accumulator(model->parameters(),
                                      GradientAccumulatorOptions().max_norm(0.5));
      for (int window = 0; window < 3; ++window) {
        if (models.size() == 1) {
          accumulate(accumulator, model, batches);
          accumulator.step({&biases, matrices.get()});
        } else {
          stock_step(model, biases, batches, 0.5);
          matrices->step();
        }
      }
    }
    expect_no_further(models[0], models[1], models[2]);
  }
}

TEST(GradientAccumulatorSeveral, ModelsShareAStep) {
  const std::vector<at::Tensor> batches = micro_batches();
  std::vector<std::vector<TwoLayers>> pairs;
  for (const at::ScalarType dtype : {at::kFloat, at::kFloat, at::kDouble}) {
    pairs.push_back({model_of(1, dtype), model_of(2, dtype)});
    TwoLayers& a = pairs.back()[0];
    TwoLayers& b = pairs.back()[1];
    b->second->bias = b->register_parameter("shared", a->second->bias);
    std::vector<at::Tensor> params = a->parameters();
    params.insert(params.end(), {b->first->weight, b->first->bias, b->second->weight});
    torch::optim::SGD optimizer(params, sgd());
    if (pairs.size() == 1) {
      GradientAccumulator accumulator(
          {a->parameters(),
           {b->first->weight, b->first->bias, b->second->weight, a->second->bias}});
      for (const at::Tensor& x : batches) {
        const auto scope = accumulator.micro_batch(static_cast<double>(x.size(0)));
        (loss_sum(a, x) + loss_sum(b, x)).backward();
      }
      accumulator.step(optimizer);
    } else {
      const at::Tensor x = at::cat(batches);
      ((loss_sum(a, x) + loss_sum(b, x)) / x.size(0)).backward();
      optimizer.step();
    }
  }
  for (int k = 0; k < 2; ++k) expect_no_further(pairs[0][k], pairs[1][k], pairs[2][k]);
}

TEST(GradientAccumulatorSeveral, OptimizersAreChecked) {
  TwoLayers model = model_of(1);
  torch::optim::SGD all(model->parameters(), sgd());
  torch::optim::SGD one({model->first->weight}, sgd());
  GradientAccumulator accumulator(model->parameters());
  accumulate(accumulator, model, micro_batches());
  expect_refused(
      [&] {
        accumulator.step({&all, &one});
      },
      "optimizers takes optimizers that share no parameters, got two that hold one of "
      "sizes [9, 6]");
  expect_refused([&] { accumulator.step({&one}); }, "got one without parameter 1");
  expect_refused(
      [&] {
        accumulator.step({&all, nullptr});
      },
      "optimizers takes optimizers, got none");
  EXPECT_EQ(accumulator.micro_batches(), 3);
  accumulator.step(all);
}

TEST(GradientAccumulatorSeveral, ASeparateMicroBatchIsDiscardedAfterItsBackward) {
  // Large enough to be added while backward runs.
  torch::nn::Linear layer(300, 300);
  torch::optim::SGD optimizer(layer->parameters(), sgd());
  GradientAccumulator accumulator(layer->parameters());
  const at::Tensor x = at::ones({2, 300});
  for (const bool separate : {false, true}) {
    {
      const auto scope = accumulator.micro_batch();
      layer(x).sum().backward();
    }
    auto scope = accumulator.micro_batch(1.0, separate);
    layer(x).sum().backward();
    if (separate) {
      scope.discard();
    } else {
      expect_refused([&] { scope.discard(); }, "discard() comes before backward()");
    }
  }
  EXPECT_EQ(accumulator.micro_batches(), 3);
  accumulator.step(optimizer);
}

}  // namespace
}  // namespace torch_ext
