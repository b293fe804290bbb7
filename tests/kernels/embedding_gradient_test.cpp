// weight_grad = beta * weight_grad + what the tokens of each row add on every instruction set
// against the reference.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/embedding_groups.h"
#include "kernels/reference/accumulation_reference.h"
#include "kernels_under_test.h"
#include "list_tensor.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

struct EmbeddingCase {
  std::int64_t num_embeddings = 20;
  std::int64_t dim = 9;
  ScalarType weight_type = ScalarType::kFloat32;
  ScalarType grad_type = ScalarType::kBFloat16;
  std::vector<std::int64_t> indices = {3, 7, 3, 0, 19, 3, 7};
  std::int64_t padding_idx = -1;
  bool scale_by_frequency = false;
  double beta = 1.0;
  std::vector<std::int64_t> weight_strides{};  // empty: dense
  std::vector<std::int64_t> grad_strides{};
  GuardSide side = GuardSide::kBack;
  std::int64_t shift = 0;
};

struct EmbeddingTensors {
  ListTensor weight, grad;
  EmbeddingGroups groups;

  explicit EmbeddingTensors(const EmbeddingCase& c)
      : weight(c.weight_type, {{c.num_embeddings, c.dim}, c.weight_strides, c.side, c.shift}),
        grad(c.grad_type, {{static_cast<std::int64_t>(c.indices.size()), c.dim},
                           c.grad_strides,
                           c.side,
                           c.shift}),
        groups(group_by_row(c.indices.data(), static_cast<std::int64_t>(c.indices.size()),
                            c.num_embeddings, c.padding_idx)) {
    grad.fill(1);
    if (c.beta != 0.0) weight.fill(2);
  }

  EmbeddingGradientParams params(const EmbeddingCase& c) const {
    return {.num_embeddings = c.num_embeddings,
            .dim = c.dim,
            .weight_grad = {weight.operand().data, weight.type(), weight.strides()[0],
                            weight.strides()[1]},
            .grad_output = {grad.operand().data, grad.type(), grad.strides()[0], grad.strides()[1]},
            .num_rows = static_cast<std::int64_t>(groups.rows.size()),
            .rows = groups.rows.data(),
            .starts = groups.starts.data(),
            .positions = groups.positions.data(),
            .scale_by_frequency = c.scale_by_frequency,
            .beta = c.beta};
  }
};

class EmbeddingGradient : public KernelTest {
 protected:
  EmbeddingTensors run(const EmbeddingCase& c,
                       const TaskRunner& runner = SerialTaskRunner()) const {
    EmbeddingTensors tensors(c);
    kernel().embedding_gradient(tensors.params(c), runner);
    return tensors;
  }

  void check(const EmbeddingCase& c, const TaskRunner& runner = SerialTaskRunner()) const {
    const EmbeddingTensors actual = run(c, runner);
    const EmbeddingTensors expected(c);
    embedding_gradient_reference(expected.params(c));
    const bool is_double =
        c.weight_type == ScalarType::kFloat64 || c.grad_type == ScalarType::kFloat64;
    expect_close(actual.weight, expected.weight,
                 {is_double, 2.0 * static_cast<double>(c.indices.size() + 2)},
                 std::to_string(c.num_embeddings) + " x " + std::to_string(c.dim) +
                     " += " + dtype_name(c.grad_type) + ", beta " + std::to_string(c.beta));
  }
};

/// Tokens that name a few rows often and others once.
std::vector<std::int64_t> varied_indices(std::int64_t tokens, std::int64_t num_embeddings) {
  std::vector<std::int64_t> indices;
  for (std::int64_t i = 0; i < tokens; ++i) {
    const auto bits = static_cast<std::int64_t>(1e6 * (2.0 + varied_number(9, i)));
    indices.push_back(i % 3 == 0 ? 1 % num_embeddings : bits % num_embeddings);
  }
  return indices;
}

TEST_P(EmbeddingGradient, EveryDim) {
  for (std::int64_t dim = 1; dim <= 70; ++dim) {
    for (const double beta : {1.0, 0.0, 0.5}) check({.dim = dim, .beta = beta});
  }
  for (const std::int64_t dim : {511, 512, 513, 1100}) {
    for (const double beta : {1.0, 0.0}) check({.dim = dim, .beta = beta});
  }
}

TEST_P(EmbeddingGradient, EveryMixOfDtypes) {
  for (const ScalarType weight : kListDtypes) {
    for (const ScalarType grad : kListDtypes) {
      for (const double beta : {1.0, 0.0, -0.5}) {
        for (const bool by_frequency : {false, true}) {
          check({.dim = 37,
                 .weight_type = weight,
                 .grad_type = grad,
                 .indices = varied_indices(50, 20),
                 .scale_by_frequency = by_frequency,
                 .beta = beta});
        }
      }
    }
  }
}

TEST_P(EmbeddingGradient, LayoutsAndAddresses) {
  for (const ScalarType grad : kListDtypes) {
    for (const double beta : {1.0, 0.0}) {
      for (const std::int64_t shift : {0, 1, 4}) {
        EmbeddingCase c{.dim = 33, .grad_type = grad, .beta = beta, .shift = shift};
        if (shift != 0) c.side = GuardSide::kFront;
        for (const auto& weight_strides :
             std::vector<std::vector<std::int64_t>>{{33, 1}, {40, 1}, {1, 20}, {66, 2}}) {
          for (const auto& grad_strides :
               std::vector<std::vector<std::int64_t>>{{33, 1}, {35, 1}, {1, 7}, {0, 1}, {0, 0}}) {
            c.weight_strides = weight_strides;
            c.grad_strides = grad_strides;
            check(c);
          }
        }
      }
    }
  }
}

TEST_P(EmbeddingGradient, RowsNamedThousandsOfTimes) {
  for (const std::int64_t tokens : {63, 64, 65, 255, 256, 257, 1000, 3000}) {
    for (const bool by_frequency : {false, true}) {
      EmbeddingCase c{.num_embeddings = 5,
                      .dim = 20,
                      .indices = std::vector<std::int64_t>(static_cast<std::size_t>(tokens), 2),
                      .scale_by_frequency = by_frequency};
      check(c);
      c.indices = varied_indices(tokens, 5);
      check(c, ThreadTaskRunner(3));
    }
  }
}

TEST_P(EmbeddingGradient, PaddingIsLeftOut) {
  for (const double beta : {1.0, 0.0}) {
    const EmbeddingCase c{.indices = {3, 7, 3, 0, 3}, .padding_idx = 3, .beta = beta};
    check(c);
    const EmbeddingTensors tensors = run(c);
    const EmbeddingTensors before(c);
    for (std::int64_t col = 0; col < c.dim; ++col) {
      ASSERT_EQ(tensors.weight.get(3 * c.dim + col),
                beta == 0.0 ? 0.0 : before.weight.get(3 * c.dim + col));
    }
  }
}

TEST_P(EmbeddingGradient, ManyRows) {
  for (const double beta : {1.0, 0.0, 0.5}) {
    check({.num_embeddings = 3000, .dim = 8, .indices = varied_indices(500, 3000), .beta = beta},
          ThreadTaskRunner(3));
    check({.num_embeddings = 700, .dim = 600, .indices = varied_indices(90, 700), .beta = beta},
          ThreadTaskRunner(2));
  }
}

TEST_P(EmbeddingGradient, EveryThreadCountGivesTheSameBits) {
  for (const ScalarType grad : kListDtypes) {
    for (const double beta : {1.0, 0.5}) {
      const EmbeddingCase c{.num_embeddings = 600,
                            .dim = 530,
                            .grad_type = grad,
                            .indices = varied_indices(900, 600),
                            .beta = beta};
      const std::vector<std::uint8_t> expected = run(c).weight.bytes();
      for (int workers = 1; workers <= 7; ++workers) {
        EXPECT_TRUE(
            run(c, ThreadTaskRunner(workers, 7u + static_cast<unsigned>(workers))).weight.bytes() ==
            expected)
            << workers << " threads";
        EXPECT_TRUE(run(c, ReversedTaskRunner(workers)).weight.bytes() == expected);
      }
    }
  }
}

TEST_P(EmbeddingGradient, ZeroSizes) {
  for (const double beta : {1.0, 0.0}) {
    check({.indices = {}, .beta = beta});
    check({.dim = 0, .beta = beta});
    check({.num_embeddings = 0, .indices = {}, .beta = beta});
    check({.indices = {4, 4}, .padding_idx = 4, .beta = beta});
  }
}

TORCH_EXT_TEST_EACH_LIST_KERNEL(EmbeddingGradient);

// The grouping itself.

TEST(EmbeddingGroups, TokensComeInTheirOrder) {
  const std::vector<std::int64_t> indices = {3, 7, 3, 0, 19, 3, 7};
  const EmbeddingGroups groups = group_by_row(indices.data(), 7, 20, -1);
  EXPECT_EQ(groups.rows, (std::vector<std::int64_t>{0, 3, 7, 19}));
  EXPECT_EQ(groups.starts, (std::vector<std::int64_t>{0, 1, 4, 6, 7}));
  EXPECT_EQ(groups.positions, (std::vector<std::int64_t>{3, 0, 2, 5, 1, 6, 4}));
}

TEST(EmbeddingGroups, RowsOfEveryMagnitude) {
  // Digits of 11 bits: tables that take one to six passes.
  for (const std::int64_t num_embeddings :
       {std::int64_t{1}, std::int64_t{2048}, std::int64_t{2049}, std::int64_t{1} << 22,
        (std::int64_t{1} << 33) + 5, std::numeric_limits<std::int64_t>::max()}) {
    std::vector<std::int64_t> indices;
    for (std::int64_t i = 0; i < 200; ++i) {
      indices.push_back(static_cast<std::int64_t>(static_cast<double>(num_embeddings) * 0.999 *
                                                  (varied_number(5, i / 2) + 2.0) / 4.0));
    }
    const EmbeddingGroups groups = group_by_row(indices.data(), 200, num_embeddings, -1);
    ASSERT_EQ(groups.starts.size(), groups.rows.size() + 1);
    std::vector<bool> seen(200);
    for (std::size_t r = 0; r < groups.rows.size(); ++r) {
      if (r > 0) {
        EXPECT_LT(groups.rows[r - 1], groups.rows[r]);
      }
      for (std::int64_t i = groups.starts[r]; i < groups.starts[r + 1]; ++i) {
        const std::int64_t position = groups.positions[static_cast<std::size_t>(i)];
        EXPECT_EQ(indices[static_cast<std::size_t>(position)], groups.rows[r]);
        if (i > groups.starts[r]) {
          EXPECT_LT(groups.positions[static_cast<std::size_t>(i - 1)], position);
        }
        seen[static_cast<std::size_t>(position)] = true;
      }
    }
    EXPECT_EQ(std::vector<bool>(200, true), seen);
  }
}

TEST(EmbeddingGroups, IndicesOutOfRangeAreFound) {
  const std::vector<std::int32_t> indices = {0, 4, 2, -1, 9};
  EXPECT_EQ(find_index_out_of_range(indices.data(), 3, 5), std::nullopt);
  EXPECT_EQ(find_index_out_of_range(indices.data(), 3, 4), 4);
  EXPECT_EQ(find_index_out_of_range(indices.data(), 5, 5), -1);
  EXPECT_EQ(find_index_out_of_range(indices.data(), 0, 0), std::nullopt);
}

TEST(EmbeddingGroups, BothIndexTypesAgree) {
  const std::vector<std::int32_t> narrow = {3, 7, 3, 0, 3};
  const std::vector<std::int64_t> wide(narrow.begin(), narrow.end());
  const EmbeddingGroups a = group_by_row(narrow.data(), 5, 8, 7);
  const EmbeddingGroups b = group_by_row(wide.data(), 5, 8, 7);
  EXPECT_EQ(a.rows, b.rows);
  EXPECT_EQ(a.starts, b.starts);
  EXPECT_EQ(a.positions, b.positions);
}

}  // namespace
}  // namespace torch_ext::testing
