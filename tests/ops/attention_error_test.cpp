#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <functional>
#include <string>

namespace torch_ext {
namespace {

void expect_error(const std::function<void()>& call, const std::string& part) {
  try {
    call();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(part), std::string::npos)
        << error.what_without_backtrace();
    return;
  }
  FAIL() << "nothing was thrown, expected: " << part;
}

TEST(AttentionErrors, NameOperatorAndArgument) {
  const at::Tensor query = at::randn({2, 4, 5, 8});
  expect_error(
      [&] { torch_ext::scaled_dot_product_attention(query, query.to(at::kDouble), query); },
      "torch_ext::scaled_dot_product_attention: key takes the dtype of query, Float, got "
      "Double");
  expect_error([&] { torch_ext::scaled_dot_product_attention(query, query.slice(3, 0, 4), query); },
               "key takes the head_dim of query, 8, got 4");
  expect_error([&] { torch_ext::scaled_dot_product_attention(query, query, query.slice(2, 0, 3)); },
               "value takes the length of key, 5, got 3");
  expect_error([&] { torch_ext::scaled_dot_product_attention(query.to(at::kInt), query, query); },
               "query takes Float, Double, BFloat16 or Half, got Int");
  expect_error([&] { torch_ext::scaled_dot_product_attention(query.to_sparse(), query, query); },
               "sparse tensors are not supported");
  expect_error(
      [&] {
        torch_ext::scaled_dot_product_attention(query, query, query, at::zeros({3, 5}, at::kBool));
      },
      "attn_mask takes a shape that broadcasts to (batch..., heads, q_len, kv_len), [2, 4, 5, 5], "
      "got [3, 5]");
  expect_error(
      [&] {
        torch_ext::scaled_dot_product_attention(query, query, query, at::zeros({5, 5}), 0.0,
                                                /*is_causal=*/true);
      },
      "attn_mask takes None when is_causal=True");
  expect_error(
      [&] { torch_ext::scaled_dot_product_attention(query, query, query, std::nullopt, 1.5); },
      "dropout_p takes a probability in [0, 1], got 1.5");
}

TEST(AttentionErrors, DrawNothing) {
  const at::Tensor query = at::randn({2, 4, 5, 8});
  torch::manual_seed(3);
  const at::Tensor expected = at::rand({4});
  torch::manual_seed(3);
  EXPECT_THROW(torch_ext::scaled_dot_product_attention(query, query.slice(3, 0, 4), query,
                                                       std::nullopt, 0.5),
               c10::Error);
  EXPECT_TRUE(at::equal(at::rand({4}), expected));
}

TEST(AttentionErrors, SelfAttentionParameters) {
  const at::Tensor input = at::randn({2, 5, 8});
  const at::Tensor in_proj = at::randn({24, 8});
  const at::Tensor out_proj = at::randn({8, 8});
  expect_error([&] { self_attention(input, in_proj, std::nullopt, out_proj, std::nullopt, 3); },
               "torch_ext::self_attention: num_heads takes a divisor of embed, 8, got 3");
  expect_error([&] { self_attention(input, out_proj, std::nullopt, out_proj, std::nullopt, 2); },
               "in_proj_weight takes the shape (3 * embed, embed), [24, 8], got [8, 8]");
  expect_error(
      [&] {
        self_attention(input, in_proj, std::nullopt, out_proj, std::nullopt, 2, std::nullopt, 0.0,
                       false, at::zeros({2, 4}, at::kBool));
      },
      "key_padding_mask takes a shape that broadcasts to (batch..., kv_len), [2, 5], got [2, 4]");
}

}  // namespace
}  // namespace torch_ext
