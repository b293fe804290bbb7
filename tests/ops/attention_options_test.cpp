// The options struct of the C++ functions, against torch's operators with what it stands for
// written out.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include "explicit_attention.h"

namespace torch_ext {
namespace {

using testing::gradients;
using testing::kSameButForRounding;
using testing::random_leaf;
using testing::relative_error;

constexpr double kSoftcap = 1.5;

struct Inputs {
  at::Tensor query = random_leaf({2, 3, 21, 16});
  at::Tensor key = random_leaf({2, 3, 30, 16});
  at::Tensor value = random_leaf({2, 3, 30, 16});
  at::Tensor sink = random_leaf({3});
  at::Tensor slopes = at::rand({3});

  std::vector<at::Tensor> all() const { return {query, key, value, sink}; }

  AttentionOptions options() const {
    return {.is_causal = true,
            .window_size = {7, 4},
            .softcap = kSoftcap,
            .alibi_slopes = slopes,
            .sink = sink,
            .causal_lower_right = true};
  }

  at::Tensor expected() const {
    const at::Tensor scores = query.matmul(key.transpose(-2, -1)) / 4.0;
    const at::Tensor distance = at::arange(30) - at::arange(21).unsqueeze(1) - 9;
    const at::Tensor biased =
        kSoftcap * (scores / kSoftcap).tanh() - slopes.view({3, 1, 1}) * distance.abs();
    const at::Tensor masked = biased.masked_fill(distance.gt(0).logical_or(distance.lt(-7)),
                                                 -std::numeric_limits<double>::infinity());
    const at::Tensor column = sink.view({3, 1, 1}).expand({2, 3, 21, 1});
    return at::cat({masked, column}, -1).softmax(-1).narrow(-1, 0, 30).matmul(value);
  }
};

TEST(AttentionOptions, AllOfThemTrain) {
  const Inputs inputs;
  const at::Tensor expected = inputs.expected();
  const at::Tensor weights = at::randn_like(expected);
  const auto reference = gradients(expected, inputs.all(), weights);
  for (const at::Tensor& out :
       {scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, inputs.options()),
        std::get<0>(attention_forward(inputs.query, inputs.key, inputs.value, inputs.options()))}) {
    EXPECT_LT(relative_error(out, expected), kSameButForRounding);
    const auto actual = gradients(out, inputs.all(), weights);
    for (std::size_t input = 0; input < actual.size(); ++input) {
      EXPECT_LT(relative_error(actual[input], reference[input]), kSameButForRounding)
          << "input " << input;
    }
  }
}

TEST(AttentionOptions, GroupsOfKeysAndOfValuesMayDiffer) {
  const at::Tensor query = at::randn({1, 6, 5, 8});
  const at::Tensor key = at::randn({1, 2, 7, 8});
  const at::Tensor value = at::randn({1, 3, 7, 8});
  const at::Tensor out =
      scaled_dot_product_attention(query, key, value, {.enable_gqa = true, .window_size = {2, -1}});
  const at::Tensor repeated = scaled_dot_product_attention(
      query, key.repeat_interleave(3, 1), value.repeat_interleave(2, 1),
      AttentionOptions{.window_size = {2, -1}});
  EXPECT_LT(relative_error(out, repeated), kSameButForRounding);
}

TEST(AttentionOptions, SelfAttentionTakesThem) {
  const at::Tensor input = at::randn({2, 9, 8});
  const at::Tensor in_weight = at::randn({24, 8}), out_weight = at::randn({8, 8});
  const auto layer = [&](const AttentionOptions& options) {
    return self_attention(input, in_weight, std::nullopt, out_weight, std::nullopt, 2, options);
  };
  const at::Tensor distance = at::arange(9) - at::arange(9).unsqueeze(1);
  const at::Tensor mask = distance.le(0).logical_and(distance.ge(-3));
  EXPECT_LT(relative_error(layer({.is_causal = true, .window_size = {3, -1}}),
                           layer({.attn_mask = mask})),
            kSameButForRounding);
  try {
    layer({.scale = 2.0});
    FAIL() << "took a scale";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("options takes no scale"), std::string::npos);
  }
}

}  // namespace
}  // namespace torch_ext
