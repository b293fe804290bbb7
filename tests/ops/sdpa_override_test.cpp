#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <string>

#include "explicit_attention.h"

namespace torch_ext {
namespace {

using testing::kSameButForRounding;
using testing::relative_error;

bool runs_fused(const at::Tensor& query) {
  // A call of known path first, so that what is read below is of the call that is asked about.
  torch_ext::scaled_dot_product_attention(query.slice(2, 0, 0), query, query);
  EXPECT_EQ(std::string(last_attention_path()), "cpu.empty");
  at::scaled_dot_product_attention(query, query, query);
  return std::string(last_attention_path()) != "cpu.empty";
}

TEST(SdpaOverride, SwitchesAten) {
  const at::Tensor query = at::randn({2, 4, 33, 16});
  const at::Tensor stock = at::scaled_dot_product_attention(query, query, query);
  EXPECT_FALSE(is_enabled());
  EXPECT_FALSE(runs_fused(query));
  enable();
  EXPECT_TRUE(is_enabled());
  EXPECT_TRUE(runs_fused(query));
  EXPECT_LT(relative_error(at::scaled_dot_product_attention(query, query, query), stock),
            kSameButForRounding);
  disable();
  EXPECT_FALSE(is_enabled());
  EXPECT_FALSE(runs_fused(query));
}

TEST(SdpaOverride, ScopesNestAndRestore) {
  const at::Tensor query = at::randn({2, 4, 33, 16});
  {
    const EnabledScope outer;
    EXPECT_TRUE(runs_fused(query));
    {
      const EnabledScope inner(/*on=*/false);
      EXPECT_FALSE(runs_fused(query));
    }
    EXPECT_TRUE(runs_fused(query));
  }
  EXPECT_FALSE(runs_fused(query));
}

TEST(SdpaOverride, TakesCudaTensorsOnlyWhereAskedTo) {
  enable();
  EXPECT_FALSE(is_cuda_enabled());
  enable(/*cuda=*/true);
  EXPECT_TRUE(is_cuda_enabled());
  {
    const EnabledScope inner;
    EXPECT_TRUE(is_enabled());
    EXPECT_FALSE(is_cuda_enabled());
    const EnabledScope with_cuda(/*on=*/true, /*cuda=*/true);
    EXPECT_TRUE(is_cuda_enabled());
  }
  EXPECT_TRUE(is_cuda_enabled());
  disable();
  EXPECT_FALSE(is_cuda_enabled());
}

TEST(SdpaOverride, TrainsLibTorchModules) {
  torch::nn::MultiheadAttention layer(torch::nn::MultiheadAttentionOptions(32, 4));
  const at::Tensor input = at::randn({7, 2, 32});  // (seq, batch, embed)
  const auto gradient = [&layer, &input] {
    layer->zero_grad();
    std::get<0>(
        layer->forward(input, input, input, /*key_padding_mask=*/{}, /*need_weights=*/false))
        .square()
        .sum()
        .backward();
    return layer->in_proj_weight.grad().clone();
  };
  const at::Tensor stock = gradient();
  const EnabledScope scope;
  EXPECT_LT(relative_error(gradient(), stock), kSameButForRounding);
}

}  // namespace
}  // namespace torch_ext
