// A small model, its micro-batches, and stock's way to train it: for the tests of
// GradientAccumulator.
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace torch_ext {

struct TwoLayersImpl : torch::nn::Module {
  TwoLayersImpl()
      : first(register_module("first", torch::nn::Linear(6, 9))),
        second(register_module("second", torch::nn::Linear(9, 4))) {}
  at::Tensor forward(const at::Tensor& x) { return second(torch::tanh(first(x))); }
  torch::nn::Linear first, second;
};
TORCH_MODULE(TwoLayers);

/// The same weights for the same seed.
inline TwoLayers model_of(std::uint64_t seed, at::ScalarType dtype = at::kFloat) {
  torch::manual_seed(seed);
  TwoLayers model;
  model->to(dtype);
  return model;
}

inline std::vector<at::Tensor> micro_batches() {
  torch::manual_seed(7);
  return {at::randn({3, 6}), at::randn({1, 6}), at::randn({5, 6})};
}

/// In the model's dtype.
inline at::Tensor loss_sum(TwoLayers& model, const at::Tensor& x) {
  return model(x.to(model->first->weight.scalar_type())).square().sum();
}

inline void accumulate(GradientAccumulator& accumulator, TwoLayers& model,
                       const std::vector<at::Tensor>& batches) {
  for (const at::Tensor& x : batches) {
    const auto scope = accumulator.micro_batch(static_cast<double>(x.size(0)));
    loss_sum(model, x).backward();
  }
}

/// The mean loss's gradient in .grad.
inline void stock_backward(TwoLayers& model, const std::vector<at::Tensor>& batches) {
  model->zero_grad();
  const at::Tensor x = at::cat(batches);
  (loss_sum(model, x) / x.size(0)).backward();
}

inline double stock_step(TwoLayers& model, torch::optim::Optimizer& optimizer,
                         const std::vector<at::Tensor>& batches, double max_norm,
                         double norm_type = 2.0) {
  stock_backward(model, batches);
  const double norm = torch::nn::utils::clip_grad_norm_(model->parameters(), max_norm, norm_type);
  optimizer.step();
  return norm;
}

using Optimizers =
    std::function<std::unique_ptr<torch::optim::Optimizer>(const std::vector<at::Tensor>&)>;

template <typename Optimizer, typename Options>
Optimizers maker(Options options) {
  return [options](const std::vector<at::Tensor>& params) {
    return std::make_unique<Optimizer>(params, options);
  };
}

/// No further from float64 than four times as far as stock is, and some roundings: see
/// tests/python/rounding_bounds.py.
inline void expect_no_further(double ours, double stock, double exact, double epsilon) {
  EXPECT_LE(std::abs(ours - exact),
            4.0 * std::abs(stock - exact) + 8.0 * epsilon * std::abs(exact));
}

/// The same of each parameter, in norm.
inline void expect_no_further(const TwoLayers& model, const TwoLayers& stock,
                              const TwoLayers& exact) {
  for (std::size_t i = 0; i < exact->parameters().size(); ++i) {
    const at::Tensor reference = exact->parameters()[i].detach();
    const auto error = [&](const TwoLayers& other) {
      return (other->parameters()[i].detach().to(at::kDouble) - reference).norm().item<double>();
    };
    const double epsilon = std::numeric_limits<float>::epsilon();
    EXPECT_LE(error(model), 4.0 * error(stock) + 8.0 * epsilon * reference.norm().item<double>())
        << "parameter " << i;
  }
}

inline void expect_equal(const TwoLayers& a, const TwoLayers& b) {
  for (std::size_t i = 0; i < b->parameters().size(); ++i) {
    EXPECT_TRUE(at::equal(a->parameters()[i], b->parameters()[i])) << "parameter " << i;
  }
}

inline void expect_refused(const std::function<void()>& call, const std::string& part) {
  try {
    call();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(part), std::string::npos)
        << error.what_without_backtrace();
    return;
  }
  FAIL() << "nothing was thrown, expected: " << part;
}

}  // namespace torch_ext
