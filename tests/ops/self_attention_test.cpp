#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include "explicit_attention.h"

namespace torch_ext {
namespace {

using testing::explicit_attention;
using testing::gradients;
using testing::kSameButForRounding;
using testing::random_leaf;
using testing::relative_error;

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kEmbed = 32;

struct Layer {
  at::Tensor in_proj_weight = random_leaf({3 * kEmbed, kEmbed});
  at::Tensor in_proj_bias = random_leaf({3 * kEmbed});
  at::Tensor out_proj_weight = random_leaf({kEmbed, kEmbed});
  at::Tensor out_proj_bias = random_leaf({kEmbed});

  at::Tensor fused(const at::Tensor& input, bool is_causal,
                   const std::optional<at::Tensor>& padding) const {
    return self_attention(input, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias,
                          kHeads, std::nullopt, /*dropout_p=*/0.0, is_causal, padding);
  }

  at::Tensor written_out(const at::Tensor& input, bool is_causal,
                         const std::optional<at::Tensor>& padding) const {
    const auto parts = at::linear(input, in_proj_weight, in_proj_bias).chunk(3, -1);
    const auto heads = [](const at::Tensor& merged) {
      return merged.unflatten(-1, {kHeads, kEmbed / kHeads}).transpose(1, 2);
    };
    std::optional<at::Tensor> mask;
    if (padding.has_value()) mask = padding->logical_not().unsqueeze(1).unsqueeze(1);
    const at::Tensor out =
        explicit_attention(heads(parts[0]), heads(parts[1]), heads(parts[2]), mask, is_causal);
    return at::linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias);
  }

  std::vector<at::Tensor> parameters() const {
    return {in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias};
  }
};

TEST(SelfAttention, TrainsAsItsParts) {
  const Layer layer;
  const at::Tensor input = random_leaf({3, 19, kEmbed});
  const at::Tensor padding = at::zeros({3, 19}, at::kBool);
  padding.slice(0, 1).slice(1, 11).fill_(true);
  const at::Tensor out = layer.fused(input, /*is_causal=*/true, padding);
  const at::Tensor expected = layer.written_out(input, /*is_causal=*/true, padding);
  EXPECT_LT(relative_error(out, expected), kSameButForRounding);
  std::vector<at::Tensor> inputs = layer.parameters();
  inputs.push_back(input);
  const at::Tensor weights = at::randn_like(out);
  const auto actual = gradients(out, inputs, weights);
  const auto reference = gradients(expected, inputs, weights);
  // Weights of size 1 make scores of some dozens, whose roundings the exponential enlarges: half as
  // much again as the bound without a factor was seen.
  for (std::size_t index = 0; index < inputs.size(); ++index) {
    EXPECT_LT(relative_error(actual[index], reference[index]), 4.0 * kSameButForRounding)
        << "input " << index;
  }
}

TEST(SelfAttention, TakesOneSequence) {
  const Layer layer;
  const at::Tensor input = random_leaf({19, kEmbed});
  const at::NoGradGuard no_grad;
  const at::Tensor out = layer.fused(input, /*is_causal=*/true, std::nullopt);
  EXPECT_TRUE(at::equal(out, layer.fused(input.unsqueeze(0), true, std::nullopt).squeeze(0)));
}

TEST(SelfAttention, InferenceEqualsTraining) {
  const Layer layer;
  const at::Tensor input = random_leaf({3, 19, kEmbed});
  const at::Tensor trained = layer.fused(input, /*is_causal=*/false, std::nullopt);
  const at::NoGradGuard no_grad;
  EXPECT_TRUE(at::equal(layer.fused(input, /*is_causal=*/false, std::nullopt), trained));
}

}  // namespace
}  // namespace torch_ext
