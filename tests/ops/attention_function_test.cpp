#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <string>

#include "explicit_attention.h"

namespace torch_ext {
namespace {

using testing::explicit_attention;
using testing::gradients;
using testing::kSameButForRounding;
using testing::random_leaf;
using testing::relative_error;

struct Inputs {
  at::Tensor query = random_leaf({2, 4, 37, 24});
  at::Tensor key = random_leaf({2, 4, 45, 24});
  at::Tensor value = random_leaf({2, 4, 45, 16});

  std::vector<at::Tensor> all() const { return {query, key, value}; }
};

void expect_same_gradients(const at::Tensor& out, const at::Tensor& expected,
                           const std::vector<at::Tensor>& inputs) {
  EXPECT_LT(relative_error(out, expected), kSameButForRounding);
  const at::Tensor weights = at::randn_like(out);
  const auto actual = gradients(out, inputs, weights);
  const auto reference = gradients(expected, inputs, weights);
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    EXPECT_LT(relative_error(actual[input], reference[input]), kSameButForRounding)
        << "input " << input;
  }
}

TEST(ScaledDotProductAttention, Trains) {
  const Inputs inputs;
  expect_same_gradients(
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value),
      explicit_attention(inputs.query, inputs.key, inputs.value), inputs.all());
}

TEST(ScaledDotProductAttention, TrainsWithCausalMaskAndScale) {
  const Inputs inputs;
  expect_same_gradients(
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, std::nullopt,
                                              /*dropout_p=*/0.0, /*is_causal=*/true,
                                              /*scale=*/-0.3),
      explicit_attention(inputs.query, inputs.key, inputs.value, std::nullopt, true, -0.3),
      inputs.all());
}

TEST(ScaledDotProductAttention, TrainsWithBooleanMaskThatEmptiesRows) {
  const Inputs inputs;
  at::Tensor mask = at::rand({2, 1, 37, 45}).gt(0.4);
  mask.select(2, 5).fill_(false);
  const at::Tensor out =
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, mask);
  EXPECT_EQ(out.select(2, 5).abs().max().item<float>(), 0.0F);
  expect_same_gradients(out, explicit_attention(inputs.query, inputs.key, inputs.value, mask),
                        inputs.all());
}

TEST(ScaledDotProductAttention, DifferentiatesAdditiveMask) {
  const Inputs inputs;
  const at::Tensor bias = random_leaf({4, 37, 45});
  std::vector<at::Tensor> all = inputs.all();
  all.push_back(bias);
  expect_same_gradients(
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, bias),
      explicit_attention(inputs.query, inputs.key, inputs.value, bias), all);
}

TEST(ScaledDotProductAttention, TrainsGroupedQueries) {
  const at::Tensor query = random_leaf({2, 6, 19, 16});
  const at::Tensor key = random_leaf({2, 2, 23, 16});
  const at::Tensor value = random_leaf({2, 2, 23, 16});
  expect_same_gradients(torch_ext::scaled_dot_product_attention(query, key, value, std::nullopt,
                                                                0.0, /*is_causal=*/true,
                                                                std::nullopt, /*enable_gqa=*/true),
                        explicit_attention(query, key, value, std::nullopt, true),
                        {query, key, value});
}

TEST(ScaledDotProductAttention, InferenceEqualsTraining) {
  const Inputs inputs;
  const at::Tensor trained =
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value);
  const at::NoGradGuard no_grad;
  const at::Tensor out =
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value);
  EXPECT_FALSE(out.requires_grad());
  EXPECT_TRUE(at::equal(out, trained));
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::equal(
      torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value), trained));
}

TEST(ScaledDotProductAttention, DropsFromTheGenerator) {
  const Inputs inputs;
  const auto draw = [&inputs] {
    return torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value,
                                                   std::nullopt, 0.5);
  };
  torch::manual_seed(1);
  const at::Tensor first = draw();
  const at::Tensor second = draw();
  torch::manual_seed(1);
  EXPECT_TRUE(at::equal(draw(), first));
  EXPECT_FALSE(at::equal(second, first));
}

TEST(ScaledDotProductAttention, SecondOrder) {
  const at::Tensor query = random_leaf({1, 2, 5, 4}, at::kDouble);
  const at::Tensor key = random_leaf({1, 2, 7, 4}, at::kDouble);
  const at::Tensor value = random_leaf({1, 2, 7, 3}, at::kDouble);
  const std::vector<at::Tensor> inputs{query, key, value};
  const auto penalty_gradients = [&inputs](const at::Tensor& out) {
    const auto grads = torch::autograd::grad({out.square().sum()}, inputs, {}, std::nullopt,
                                             /*create_graph=*/true);
    at::Tensor penalty = grads[0].square().sum();
    for (std::size_t input = 1; input < grads.size(); ++input) {
      penalty = penalty + grads[input].square().sum();
    }
    return torch::autograd::grad({penalty}, inputs);
  };
  const auto actual = penalty_gradients(torch_ext::scaled_dot_product_attention(query, key, value));
  const auto expected = penalty_gradients(explicit_attention(query, key, value));
  for (std::size_t input = 0; input < inputs.size(); ++input) {
    EXPECT_LT(relative_error(actual[input], expected[input]), 1e-12) << "input " << input;
  }
}

TEST(AttentionForward, LogsumexpAndItsGradient) {
  const Inputs inputs;
  const auto [out, logsumexp] = attention_forward(inputs.query, inputs.key, inputs.value,
                                                  {.is_causal = true, .causal_offset = 45 - 37});
  ASSERT_EQ(logsumexp.sizes(), (at::IntArrayRef{2, 4, 37}));
  const at::Tensor after = at::ones({37, 45}, at::kBool).tril(/*diagonal=*/45 - 37).logical_not();
  const at::Tensor scores =
      (at::matmul(inputs.query, inputs.key.transpose(-2, -1)) / std::sqrt(24.0))
          .masked_fill(after, -std::numeric_limits<double>::infinity());
  expect_same_gradients(logsumexp, scores.logsumexp(-1), {inputs.query, inputs.key});
}

TEST(AttentionForward, PaddingAndSeed) {
  const Inputs inputs;
  const at::Tensor padding = at::zeros({2, 45}, at::kBool);
  padding.slice(1, 30).fill_(true);
  const AttentionForwardOptions options{
      .dropout_p = 0.3, .key_padding_mask = padding, .dropout_seed = at::full({1}, 42, at::kLong)};
  const at::Tensor out =
      std::get<0>(attention_forward(inputs.query, inputs.key, inputs.value, options));
  EXPECT_TRUE(at::equal(
      std::get<0>(attention_forward(inputs.query, inputs.key, inputs.value, options)), out));
  // Ignored keys have no gradient.
  const at::Tensor grad_value = gradients(out, {inputs.value}, at::ones_like(out))[0];
  EXPECT_EQ(grad_value.slice(2, 30).abs().max().item<float>(), 0.0F);
  EXPECT_GT(grad_value.slice(2, 0, 30).abs().max().item<float>(), 0.0F);
}

TEST(LastAttentionPath, NamesTheKernel) {
  const Inputs inputs;
  torch_ext::scaled_dot_product_attention(inputs.query, inputs.key, inputs.value);
  EXPECT_EQ(std::string(last_attention_path()).rfind("cpu.", 0), 0U) << last_attention_path();
}

}  // namespace
}  // namespace torch_ext
