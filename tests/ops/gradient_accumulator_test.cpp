#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "two_layers.h"

namespace torch_ext {
namespace {

const std::vector<Optimizers>& all_optimizers() {
  namespace optim = torch::optim;
  static const std::vector<Optimizers> makers{
      maker<optim::AdamW>(optim::AdamWOptions(1e-2)),
      maker<optim::AdamW>(optim::AdamWOptions(1e-2).amsgrad(true).weight_decay(0.3)),
      maker<optim::Adam>(optim::AdamOptions(1e-2).weight_decay(0.1)),
      maker<optim::SGD>(optim::SGDOptions(0.1)),
      maker<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).dampening(0.2).weight_decay(0.1)),
      maker<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).nesterov(true)),
      maker<optim::RMSprop>(optim::RMSpropOptions(1e-3)),  // through .grad
  };
  return makers;
}

TEST(GradientAccumulatorWindow, IsOneLargeBatch) {
  const std::vector<at::Tensor> batches = micro_batches();
  for (const Optimizers& make : all_optimizers()) {
    TwoLayers model = model_of(1);
    TwoLayers stock = model_of(1);
    TwoLayers exact = model_of(1, at::kDouble);
    const auto optimizer = make(model->parameters());
    const auto stock_optimizer = make(stock->parameters());
    const auto exact_optimizer = make(exact->parameters());
    GradientAccumulator accumulator(model->parameters(),
                                    GradientAccumulatorOptions().max_norm(0.5));
    for (int window = 0; window < 3; ++window) {
      accumulate(accumulator, model, batches);
      EXPECT_EQ(accumulator.micro_batches(), 3);
      const double norm = accumulator.step(*optimizer).item<double>();
      const double stock_norm = stock_step(stock, *stock_optimizer, batches, 0.5);
      const double exact_norm = stock_step(exact, *exact_optimizer, batches, 0.5);
      expect_no_further(norm, stock_norm, exact_norm, std::numeric_limits<float>::epsilon());
      expect_no_further(model, stock, exact);
    }
    EXPECT_EQ(accumulator.micro_batches(), 0);
    EXPECT_TRUE(std::isfinite(accumulator.gradient_noise_scale().item<double>()));
    for (const at::Tensor& param : model->parameters()) EXPECT_FALSE(param.grad().defined());
  }
}

TEST(GradientAccumulatorWindow, LeavesGradientsOutsideAlone) {
  TwoLayers model = model_of(2);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  GradientAccumulator accumulator(model->parameters());
  const std::vector<at::Tensor> batches = micro_batches();
  loss_sum(model, batches[0]).backward();
  const at::Tensor before = model->first->weight.grad().clone();
  accumulate(accumulator, model, batches);
  accumulator.step(optimizer);
  EXPECT_TRUE(at::equal(model->first->weight.grad(), before));
}

TEST(GradientAccumulatorWindow, SkipsWhatIsNotFinite) {
  TwoLayers model = model_of(3);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  GradientAccumulator accumulator(model->parameters());
  const std::vector<at::Tensor> batches = micro_batches();
  accumulate(accumulator, model, batches);
  accumulator.step(optimizer);
  const at::Tensor before = model->first->weight.detach().clone();
  {
    const auto scope = accumulator.micro_batch();
    (loss_sum(model, batches[0]) * std::numeric_limits<double>::infinity()).backward();
  }
  EXPECT_FALSE(std::isfinite(accumulator.step(optimizer).item<double>()));
  EXPECT_TRUE(at::equal(model->first->weight, before));
  const auto& state = static_cast<const torch::optim::AdamWParamState&>(
      *optimizer.state().at(model->first->weight.unsafeGetTensorImpl()));
  EXPECT_EQ(state.step(), 1);
  accumulate(accumulator, model, batches);
  EXPECT_TRUE(std::isfinite(accumulator.step(optimizer).item<double>()));
  EXPECT_EQ(state.step(), 2);
}

TEST(GradientAccumulatorWindow, AnExceptionLeavesNoTrace) {
  TwoLayers model = model_of(4);
  TwoLayers without = model_of(4);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  torch::optim::SGD other(without->parameters(), torch::optim::SGDOptions(0.1));
  GradientAccumulator accumulator(model->parameters());
  const std::vector<at::Tensor> batches = micro_batches();
  accumulate(accumulator, model, batches);
  try {
    const auto scope = accumulator.micro_batch(100.0);
    loss_sum(model, batches[0]).backward();
    throw std::runtime_error("no data");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(accumulator.micro_batches(), 3);
  accumulator.step(optimizer);
  GradientAccumulator undisturbed(without->parameters());
  accumulate(undisturbed, without, batches);
  undisturbed.step(other);
  expect_equal(model, without);
}

TEST(GradientAccumulatorWindow, KeepsMastersOfBfloat16Parameters) {
  TwoLayers model = model_of(5);
  model->to(at::kBFloat16);
  // Each step is less than half a unit in the parameters' last place.
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(1e-5));
  GradientAccumulator accumulator(model->parameters());
  const at::Tensor before = model->second->bias.detach().clone();
  for (int window = 0; window < 400; ++window) {
    {
      const auto scope = accumulator.micro_batch();
      model(at::ones({1, 6}, at::kBFloat16)).sum().backward();
    }
    accumulator.step(optimizer);
  }
  // To the half of a unit in the last place that the bias is rounded by.
  const at::Tensor moved = before.to(at::kFloat) - model->second->bias.to(at::kFloat);
  const at::Tensor bound = before.to(at::kFloat).abs() * std::ldexp(1.0f, -8) + 1e-6f;
  EXPECT_TRUE(((moved - 400 * 1e-5f).abs() <= bound).all().item<bool>()) << moved;
}

TEST(GradientAccumulatorArchive, ResumesAHalfFullWindow) {
  const std::vector<at::Tensor> batches = micro_batches();
  TwoLayers model = model_of(6);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-2));
  GradientAccumulator accumulator(model->parameters(), GradientAccumulatorOptions().max_norm(0.5));
  accumulate(accumulator, model, batches);
  accumulator.step(optimizer);
  accumulate(accumulator, model, {batches[0], batches[1]});
  std::stringstream saved_model, saved_optimizer, saved_window;
  torch::save(model, saved_model);
  torch::save(optimizer, saved_optimizer);
  torch::save(accumulator, saved_window);

  TwoLayers resumed = model_of(60);
  torch::optim::AdamW resumed_optimizer(resumed->parameters(), torch::optim::AdamWOptions(1e-2));
  torch::load(resumed, saved_model);
  torch::load(resumed_optimizer, saved_optimizer);
  GradientAccumulator resumed_accumulator(resumed->parameters(),
                                          GradientAccumulatorOptions().max_norm(0.5));
  torch::load(resumed_accumulator, saved_window);
  EXPECT_EQ(resumed_accumulator.micro_batches(), 2);
  accumulate(accumulator, model, {batches[2]});
  accumulate(resumed_accumulator, resumed, {batches[2]});
  EXPECT_TRUE(at::equal(accumulator.step(optimizer), resumed_accumulator.step(resumed_optimizer)));
  expect_equal(resumed, model);
  EXPECT_TRUE(
      at::equal(accumulator.gradient_noise_scale(), resumed_accumulator.gradient_noise_scale()));
}

TEST(GradientAccumulatorArchive, OfAnotherModelIsRefused) {
  TwoLayers model = model_of(6);
  GradientAccumulator accumulator(model->parameters());
  for (const std::vector<at::Tensor>& parameters :
       {std::vector<at::Tensor>{at::zeros({2})},
        {at::zeros({9, 6}), at::zeros({9}), at::zeros({4, 8}), at::zeros({4})},
        {at::zeros({9, 6}), at::zeros({9}), at::zeros({4, 9}), at::zeros({4}), at::zeros({1})}}) {
    const GradientAccumulator other(parameters);
    std::stringstream saved;
    torch::save(other, saved);
    expect_refused([&] { torch::load(accumulator, saved); }, "takes the state of the same model");
  }
}

TEST(GradientAccumulator, AWindowWithoutGradientsIsNoStep) {
  TwoLayers model = model_of(8);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  GradientAccumulator accumulator(model->parameters());
  const at::Tensor before = model->parameters()[0].detach().clone();
  { const auto scope = accumulator.micro_batch(); }
  EXPECT_EQ(accumulator.step(optimizer).item<double>(), 0.0);
  EXPECT_TRUE(model->parameters()[0].equal(before));
  EXPECT_FALSE(accumulator.step_was_skipped());
  EXPECT_EQ(accumulator.micro_batches(), 0);
}

TEST(GradientAccumulator, AMicroBatchMayBeDiscarded) {
  TwoLayers model = model_of(8);
  GradientAccumulator accumulator(model->parameters());
  {
    auto scope = accumulator.micro_batch(3.0);
    scope.discard();
  }
  EXPECT_EQ(accumulator.micro_batches(), 0);
}

TEST(GradientAccumulatorErrors, NameArgumentAndValue) {
  TwoLayers model = model_of(8);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  GradientAccumulator accumulator(model->parameters());
  expect_refused([&] { accumulator.step(optimizer); },
                 "step() takes at least one micro-batch, got none");
  {
    const auto scope = accumulator.micro_batch();
    expect_refused([&] { accumulator.step(optimizer); }, "step() inside a micro_batch()");
    expect_refused([&] { const auto inner = accumulator.micro_batch(); },
                   "micro_batch() inside a micro_batch()");
  }
  expect_refused([&] { const auto scope = accumulator.micro_batch(-1.0); },
                 "weight takes a finite number >= 0, got -1");
  expect_refused(
      [&] { GradientAccumulator(model->parameters(), GradientAccumulatorOptions().max_norm(0.0)); },
      "max_norm takes a number > 0 or none, got 0");
  expect_refused(
      [&] {
        GradientAccumulator(model->parameters(), GradientAccumulatorOptions().dtype(at::kInt));
      },
      "dtype takes Float, Double, BFloat16 or Half, got Int");
  expect_refused([&] { GradientAccumulator(std::vector<at::Tensor>{}); },
                 "takes at least one parameter, got none");
  const at::Tensor parameter = at::zeros({2});
  expect_refused(
      [&] {
        GradientAccumulator({parameter, parameter});
      },
      "parameter 1 is named twice");
  expect_refused([&] { GradientAccumulator({at::zeros({2}, at::kComplexFloat)}); },
                 "complex tensors are not supported");
  expect_refused([&] { GradientAccumulator({model->first->weight * 2.0}); },
                 "parameter 0 takes a leaf, got the result of an operation");
  accumulate(accumulator, model, micro_batches());
  torch::optim::SGD partial({model->first->weight}, torch::optim::SGDOptions(0.1));
  expect_refused([&] { accumulator.step(partial); }, "got one without parameter 1");
  std::vector<at::Tensor> more = model->parameters();
  more.push_back(at::zeros({2}, at::requires_grad()));
  torch::optim::SGD foreign(more, torch::optim::SGDOptions(0.1));
  expect_refused([&] { accumulator.step(foreign); },
                 "takes one that holds the model's parameters only, got 1 others");
  torch::optim::LBFGS closure(model->parameters());
  expect_refused([&] { accumulator.step(closure); },
                 "takes one that steps without a closure, got LBFGS");
  accumulator.step(optimizer);  // nothing of this has touched the window
}

TEST(GradientAccumulatorErrors, SparseGradients) {
  torch::nn::Embedding embedding(torch::nn::EmbeddingOptions(5, 3).sparse(true));
  GradientAccumulator accumulator(embedding->parameters());
  expect_refused(
      [&] {
        const auto scope = accumulator.micro_batch();
        embedding(at::zeros({2}, at::kLong)).sum().backward();
      },
      "the gradient of 0 takes a dense tensor; sparse tensors are not supported");
  EXPECT_EQ(accumulator.micro_batches(), 0);
}

}  // namespace
}  // namespace torch_ext
