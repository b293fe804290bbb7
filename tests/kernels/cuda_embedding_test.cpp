// The embedding gradient's CUDA programs on the host, on what the CPU's kernel is never given:
// tokens sorted but not grouped, among them those of the padding row.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "host_launcher.h"
#include "kernels/cuda/embedding_gradient_launch.h"
#include "list_tensor.h"

namespace torch_ext::testing {
namespace {

struct EmbeddingCase {
  std::int64_t num_embeddings = 20;
  std::int64_t dim = 8;
  std::vector<std::int64_t> indices{};
  std::int64_t padding_row = -1;
  bool scale_by_frequency = false;
  double beta = 1.0;
};

/// Token by token, as the definition says.
std::vector<double> expected_gradient(const EmbeddingCase& c, const ListTensor& weight,
                                      const ListTensor& grads) {
  std::vector<double> sums(static_cast<std::size_t>(c.num_embeddings * c.dim), 0.0);
  for (std::size_t token = 0; token < c.indices.size(); ++token) {
    const std::int64_t row = c.indices[token];
    if (row == c.padding_row) continue;
    const auto named = std::count(c.indices.begin(), c.indices.end(), row);
    for (std::int64_t col = 0; col < c.dim; ++col) {
      sums[static_cast<std::size_t>(row * c.dim + col)] +=
          grads.get(static_cast<std::int64_t>(token) * c.dim + col) /
          (c.scale_by_frequency ? static_cast<double>(named) : 1.0);
    }
  }
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (c.beta != 0.0) sums[i] += c.beta * weight.get(static_cast<std::int64_t>(i));
  }
  return sums;
}

void check(const EmbeddingCase& c) {
  const auto tokens = static_cast<std::int64_t>(c.indices.size());
  const ListTensor weight(ScalarType::kFloat32, c.num_embeddings * c.dim);
  const ListTensor grads(ScalarType::kFloat32, tokens * c.dim);
  if (c.beta != 0.0) weight.fill(1);  // else it holds NaN
  grads.fill(2);
  const std::vector<double> expected = expected_gradient(c, weight, grads);

  std::vector<std::int64_t> positions(c.indices.size());
  std::iota(positions.begin(), positions.end(), 0);
  const auto row_of = [&](std::int64_t token) {
    return c.indices[static_cast<std::size_t>(token)];
  };
  std::stable_sort(positions.begin(), positions.end(),
                   [&](std::int64_t a, std::int64_t b) { return row_of(a) < row_of(b); });
  std::vector<std::int64_t> sorted(c.indices);
  std::sort(sorted.begin(), sorted.end());
  const cuda::SortedEmbeddingGradient params{
      .gradient = {.num_embeddings = c.num_embeddings,
                   .dim = c.dim,
                   .weight_grad = {weight.operand().data, ScalarType::kFloat32, c.dim, 1},
                   .grad_output = {grads.operand().data, ScalarType::kFloat32, c.dim, 1},
                   .scale_by_frequency = c.scale_by_frequency,
                   .beta = c.beta},
      .tokens = tokens,
      .sorted_rows = sorted.data(),
      .positions = positions.data(),
      .padding_row = c.padding_row};
  GuardedBuffer workspace(cuda::embedding_workspace(params));
  cuda::launch_embedding_gradient(HostLauncher{SerialTaskRunner()}, params, workspace.data());
  EXPECT_TRUE(workspace.surroundings_intact());
  EXPECT_TRUE(weight.gaps_intact());
  for (std::int64_t i = 0; i < weight.count(); ++i) {
    const double wanted = expected[static_cast<std::size_t>(i)];
    ASSERT_NEAR(weight.get(i), wanted, 1e-4 + 1e-5 * std::fabs(wanted))
        << "row " << i / c.dim << ", col " << i % c.dim << ", " << tokens << " tokens";
  }
}

std::vector<std::int64_t> random_rows(std::int64_t tokens, std::int64_t num_embeddings,
                                      std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < tokens; ++i) {
    // Row 3 is named by half of the tokens: it goes on through many blocks.
    const auto row = static_cast<std::int64_t>(generator()) % num_embeddings;
    rows.push_back(generator() % 2 == 0 ? 3 : row);
  }
  return rows;
}

TEST(CudaEmbedding, RowsThatGoOnFromBlockToBlock) {
  constexpr std::int64_t kBlock = cuda::kEmbeddingTokens;
  for (std::int64_t first : {std::int64_t{0}, std::int64_t{1}, kBlock - 1, kBlock, kBlock + 1}) {
    for (std::int64_t second :
         {std::int64_t{0}, std::int64_t{1}, kBlock - 1, kBlock, 3 * kBlock - 1, 3 * kBlock}) {
      EmbeddingCase c{.num_embeddings = 4, .dim = 4};
      c.indices.insert(c.indices.end(), static_cast<std::size_t>(first), 0);
      c.indices.insert(c.indices.end(), static_cast<std::size_t>(second), 2);
      c.indices.insert(c.indices.end(), 5, 3);
      for (const std::int64_t padding_row : {-1, 0, 1, 2, 3}) {
        c.padding_row = padding_row;
        check(c);
      }
    }
  }
}

TEST(CudaEmbedding, RandomRows) {
  for (const std::int64_t tokens : {0, 1, 63, 64, 65, 200, 1000}) {
    for (const std::int64_t dim : {1, 4, 6, 127, 128, 260}) {
      EmbeddingCase c{.num_embeddings = 30,
                      .dim = dim,
                      .indices = random_rows(tokens, 30, static_cast<std::uint32_t>(tokens + dim))};
      for (const double beta : {1.0, 0.0, 0.5}) {
        c.beta = beta;
        for (const std::int64_t padding_row : {-1, 3, 29}) {
          c.padding_row = padding_row;
          c.scale_by_frequency = !c.scale_by_frequency;
          check(c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext::testing
