// Many threads at once: forward, backward and the switch.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_ext/torch_ext.h>

#include <atomic>
#include <thread>
#include <vector>

#include "explicit_attention.h"

namespace torch_ext {
namespace {

using testing::gradients;
using testing::kSameButForRounding;
using testing::random_leaf;
using testing::relative_error;

constexpr int kThreads = 8;
constexpr int kRounds = 5;

struct Result {
  at::Tensor out;
  at::Tensor grad;
};

TEST(AttentionThreads, GiveTheSameBits) {
  std::vector<at::Tensor> inputs;
  std::vector<Result> expected;
  const auto compute = [](const at::Tensor& input) -> Result {
    const at::Tensor out = torch_ext::scaled_dot_product_attention(
        input, input, input, std::nullopt, 0.0, /*is_causal=*/true);
    return {out.detach(), gradients(out, {input}, at::ones_like(out))[0]};
  };
  for (int thread = 0; thread < kThreads; ++thread) {
    inputs.push_back(random_leaf({1, 2, 33 + thread, 16}));
    expected.push_back(compute(inputs.back()));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < kRounds; ++round) {
        const Result result = compute(inputs[thread]);
        if (!at::equal(result.out, expected[thread].out) ||
            !at::equal(result.grad, expected[thread].grad)) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(AttentionThreads, SwitchWhileOthersCompute) {
  const at::Tensor input = at::randn({1, 2, 33, 16});
  const at::Tensor expected = at::scaled_dot_product_attention(input, input, input);
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads - 1; ++thread) {
    threads.emplace_back([&] {
      while (!stop) {
        const at::Tensor out = at::scaled_dot_product_attention(input, input, input);
        if (relative_error(out, expected) > kSameButForRounding) ++wrong;
      }
    });
  }
  for (int round = 0; round < 50; ++round) {
    const EnabledScope scope;
    EXPECT_TRUE(is_enabled());
    const EnabledScope off(/*on=*/false);
    EXPECT_FALSE(is_enabled());
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(is_enabled());
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace torch_ext
