// Norms of any order, clipping by value, and the gradient in .grad before the step.
#include <cmath>
#include <limits>
#include <vector>

#include "two_layers.h"

namespace torch_ext {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

torch::optim::SGDOptions sgd() { return torch::optim::SGDOptions(0.3).momentum(0.9); }

TEST(GradientAccumulatorClipping, ByNormsOfAnyOrder) {
  const std::vector<at::Tensor> batches = micro_batches();
  for (const double norm_type : {kInfinity, 1.0, 3.0, 2.0}) {
    TwoLayers model = model_of(1);
    TwoLayers stock = model_of(1);
    TwoLayers exact = model_of(1, at::kDouble);
    torch::optim::SGD optimizer(model->parameters(), sgd());
    torch::optim::SGD stock_optimizer(stock->parameters(), sgd());
    torch::optim::SGD exact_optimizer(exact->parameters(), sgd());
    GradientAccumulator accumulator(
        model->parameters(), GradientAccumulatorOptions().max_norm(0.1).norm_type(norm_type));
    for (int window = 0; window < 3; ++window) {
      accumulate(accumulator, model, batches);
      const double norm = accumulator.step(optimizer).item<double>();
      const double stock_norm = stock_step(stock, stock_optimizer, batches, 0.1, norm_type);
      const double exact_norm = stock_step(exact, exact_optimizer, batches, 0.1, norm_type);
      expect_no_further(norm, stock_norm, exact_norm, kEpsilon);
      expect_no_further(model, stock, exact);
    }
  }
}

TEST(GradientAccumulatorClipping, ByValueAfterTheNorm) {
  const std::vector<at::Tensor> batches = micro_batches();
  for (const bool shown : {false, true}) {
    std::vector<TwoLayers> models;
    for (const at::ScalarType dtype : {at::kFloat, at::kFloat, at::kDouble}) {
      models.push_back(model_of(1, dtype));
      TwoLayers& model = models.back();
      torch::optim::SGD optimizer(model->parameters(), sgd());
      if (models.size() > 1) {
        stock_backward(model, batches);
        torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
        torch::nn::utils::clip_grad_value_(model->parameters(), 0.05);
        optimizer.step();
        continue;
      }
      GradientAccumulator accumulator(model->parameters(),
                                      GradientAccumulatorOptions().max_norm(1.0).clip_value(0.05));
      accumulate(accumulator, model, batches);
      if (shown) accumulator.fill_grad();
      accumulator.step(optimizer);
    }
    expect_no_further(models[0], models[1], models[2]);
  }
}

TEST(GradientAccumulatorClipping, ErrorIfNonfiniteDropsTheWindow) {
  TwoLayers model = model_of(1);
  torch::optim::SGD optimizer(model->parameters(), sgd());
  GradientAccumulator accumulator(model->parameters(),
                                  GradientAccumulatorOptions().error_if_nonfinite(true));
  {
    const auto scope = accumulator.micro_batch();
    (loss_sum(model, micro_batches()[0]) * kInfinity).backward();
  }
  expect_refused([&] { accumulator.step(optimizer); }, "of the gradient is not finite");
  EXPECT_EQ(accumulator.micro_batches(), 0);
  accumulate(accumulator, model, micro_batches());
  EXPECT_TRUE(std::isfinite(accumulator.step(optimizer).item<double>()));
}

TEST(GradientAccumulatorClipping, RefusesWhatIsNoBound) {
  TwoLayers model = model_of(1);
  const auto build = [&](GradientAccumulatorOptions options) {
    return [&model, options] { GradientAccumulator(model->parameters(), options); };
  };
  expect_refused(build(GradientAccumulatorOptions().clip_value(-1.0)),
                 "clip_value takes a number > 0 or none, got -1");
  expect_refused(build(GradientAccumulatorOptions().norm_type(std::nan(""))),
                 "norm_type takes a number, got nan");
}

TEST(GradientAccumulatorFillGrad, ShowsTheGradientOfTheStep) {
  const std::vector<at::Tensor> batches = micro_batches();
  TwoLayers model = model_of(2);
  TwoLayers unseen = model_of(2);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  torch::optim::AdamW other(unseen->parameters(), torch::optim::AdamWOptions(1e-2));
  const auto options = GradientAccumulatorOptions().max_norm(0.5);
  GradientAccumulator accumulator(model->parameters(), options);
  GradientAccumulator plain(unseen->parameters(), options);
  for (int window = 0; window < 2; ++window) {
    accumulate(accumulator, model, batches);
    accumulate(plain, unseen, batches);
    const at::Tensor norm = accumulator.fill_grad();
    EXPECT_GT(norm.item<double>(), 0.5);
    double square = 0.0;
    for (const at::Tensor& param : model->parameters()) {
      square += param.grad().square().sum().item<double>();
    }
    EXPECT_NEAR(std::sqrt(square), 0.5, 1e-5);
    expect_refused([&] { const auto scope = accumulator.micro_batch(); },
                   "a micro-batch after prepare_step() or fill_grad()");
    EXPECT_TRUE(at::equal(accumulator.step(optimizer), norm));
    EXPECT_TRUE(model->first->weight.grad().defined());  // as in torch
    plain.step(other);
    const at::Tensor difference = model->first->weight - unseen->first->weight;
    EXPECT_LE(difference.norm().item<double>(),
              32 * kEpsilon * unseen->first->weight.norm().item<double>());
    model->zero_grad();
  }
}

TEST(GradientAccumulatorFillGrad, StepsWithWhatIsLeftThere) {
  const std::vector<at::Tensor> batches = micro_batches();
  // Fused, through .grad, and with masters.
  for (const auto& make : {maker<torch::optim::SGD>(torch::optim::SGDOptions(0.5)),
                           maker<torch::optim::RMSprop>(torch::optim::RMSpropOptions(0.1))}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      TwoLayers model = model_of(3, dtype);
      const TwoLayers before = model_of(3, dtype);
      const auto optimizer = make(model->parameters());
      GradientAccumulator accumulator(model->parameters());
      accumulate(accumulator, model, batches);
      accumulator.fill_grad();
      const auto params = model->parameters();
      params[0].mutable_grad().zero_();
      params[1].mutable_grad() = at::Tensor();
      params[2].mutable_grad() = at::full_like(params[2], 0.5).detach();
      accumulator.step(*optimizer);
      EXPECT_TRUE(params[0].equal(before->parameters()[0]));
      EXPECT_TRUE(params[1].equal(before->parameters()[1]));
      const at::Tensor moved = (before->parameters()[2] - params[2]).detach();
      EXPECT_GT(moved.min().item<double>(), 0.1);
      EXPECT_FALSE(params[3].equal(before->parameters()[3]));
    }
  }
}

TEST(GradientAccumulatorFillGrad, AnInfinityPutThereSkipsTheStep) {
  TwoLayers model = model_of(4);
  const TwoLayers before = model_of(4);
  torch::optim::SGD optimizer(model->parameters(), sgd());
  GradientAccumulator accumulator(model->parameters());
  accumulate(accumulator, model, micro_batches());
  accumulator.fill_grad();
  model->first->bias.mutable_grad().fill_(kInfinity);
  accumulator.step(optimizer);
  EXPECT_TRUE(accumulator.step_was_skipped());
  expect_equal(model, before);
}

TEST(GradientAccumulatorFillGrad, ResetForgetsIt) {
  TwoLayers model = model_of(5);
  torch::optim::SGD optimizer(model->parameters(), sgd());
  GradientAccumulator accumulator(model->parameters());
  accumulate(accumulator, model, micro_batches());
  accumulator.fill_grad();
  accumulator.reset();
  accumulate(accumulator, model, micro_batches());
  EXPECT_EQ(accumulator.micro_batches(), 3);
  accumulator.step(optimizer);
}

}  // namespace
}  // namespace torch_ext
