// weight_grad = beta * weight_grad + grad_output^T input on every instruction set against the
// reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "kernels/reference/accumulation_reference.h"
#include "kernels_under_test.h"
#include "list_tensor.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum class MatrixLayout { kDense, kPadded, kTransposed, kEverySecond, kRowsRepeated, kOneElement };

struct WeightGradientCase {
  std::int64_t tokens = 5;
  std::int64_t out_features = 7;
  std::int64_t in_features = 9;
  ScalarType weight_type = ScalarType::kFloat32;
  ScalarType grad_type = ScalarType::kBFloat16;
  ScalarType input_type = ScalarType::kBFloat16;
  MatrixLayout weight_layout = MatrixLayout::kDense;
  MatrixLayout grad_layout = MatrixLayout::kDense;
  MatrixLayout input_layout = MatrixLayout::kDense;
  bool has_bias = true;
  ScalarType bias_type = ScalarType::kFloat32;
  std::int64_t bias_stride = 1;
  double beta = 1.0;
  GuardSide side = GuardSide::kBack;
  std::int64_t shift = 0;
};

std::string describe(const WeightGradientCase& c) {
  std::string text = std::to_string(c.tokens) + " tokens, " + std::to_string(c.out_features) +
                     " x " + std::to_string(c.in_features) + " " + dtype_name(c.weight_type) +
                     " += " + dtype_name(c.grad_type) + " * " + dtype_name(c.input_type) +
                     ", layouts";
  for (const MatrixLayout layout : {c.weight_layout, c.grad_layout, c.input_layout}) {
    text += " " + std::to_string(static_cast<int>(layout));
  }
  return text + ", beta " + std::to_string(c.beta);
}

ListTensor make_matrix(ScalarType type, std::int64_t rows, std::int64_t cols, MatrixLayout layout,
                       const WeightGradientCase& c) {
  std::vector<std::int64_t> strides;
  switch (layout) {
    case MatrixLayout::kDense:
      strides = {cols, 1};
      break;
    case MatrixLayout::kPadded:
      strides = {cols + 3, 1};
      break;
    case MatrixLayout::kTransposed:
      strides = {1, rows};
      break;
    case MatrixLayout::kEverySecond:
      strides = {2 * cols, 2};
      break;
    case MatrixLayout::kRowsRepeated:
      strides = {0, 1};
      break;
    case MatrixLayout::kOneElement:
      strides = {0, 0};
      break;
  }
  return ListTensor(type, {{rows, cols}, strides, c.side, c.shift});
}

struct WeightGradientTensors {
  ListTensor weight, bias, grad, input;

  explicit WeightGradientTensors(const WeightGradientCase& c)
      : weight(make_matrix(c.weight_type, c.out_features, c.in_features, c.weight_layout, c)),
        grad(make_matrix(c.grad_type, c.tokens, c.out_features, c.grad_layout, c)),
        input(make_matrix(c.input_type, c.tokens, c.in_features, c.input_layout, c)) {
    if (c.has_bias) {
      bias = ListTensor(c.bias_type, {{c.out_features}, {c.bias_stride}, c.side, c.shift});
    }
    grad.fill(1);
    input.fill(2);
    if (c.beta == 0.0) return;  // then nobody reads them: NaN
    weight.fill(3);
    if (bias) bias.fill(4);
  }

  WeightGradientTensors copy() const {
    WeightGradientTensors other = *this;
    other.weight = weight.copy();
    other.bias = bias.copy();
    return other;
  }

  WeightGradientParams params(const WeightGradientCase& c) const {
    const auto matrix = [](const ListTensor& tensor) {
      return ConstMatrix{tensor.operand().data, tensor.type(), tensor.strides()[0],
                         tensor.strides()[1]};
    };
    return {.tokens = c.tokens,
            .out_features = c.out_features,
            .in_features = c.in_features,
            .weight_grad = {weight.operand().data, weight.type(), weight.strides()[0],
                            weight.strides()[1]},
            .bias_grad = bias ? bias.operand() : Operand{},
            .bias_stride = c.bias_stride,
            .grad_output = matrix(grad),
            .input = matrix(input),
            .beta = c.beta};
  }

  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all = weight.bytes();
    const std::vector<std::uint8_t> of_bias = bias ? bias.bytes() : std::vector<std::uint8_t>{};
    all.insert(all.end(), of_bias.begin(), of_bias.end());
    return all;
  }
};

class WeightGradient : public KernelTest {
 protected:
  WeightGradientTensors run(const WeightGradientCase& c,
                            const TaskRunner& runner = SerialTaskRunner()) const {
    WeightGradientTensors tensors(c);
    const WeightGradientParams params = tensors.params(c);
    GuardedBuffer workspace(kernel().weight_gradient_workspace(params, runner.num_workers()),
                            GuardSide::kBack, 64);
    kernel().weight_gradient(params, runner, workspace.data());
    EXPECT_TRUE(workspace.surroundings_intact());
    return tensors;
  }

  void check(const WeightGradientCase& c, const TaskRunner& runner = SerialTaskRunner()) const {
    const WeightGradientTensors actual = run(c, runner);
    const WeightGradientTensors expected(c);
    weight_gradient_reference(expected.params(c));
    const bool is_double = c.weight_type == ScalarType::kFloat64 ||
                           c.grad_type == ScalarType::kFloat64 ||
                           c.input_type == ScalarType::kFloat64;
    // Roundings of a sum of so many terms of up to 4, in the accumulation type.
    const double magnitude = 4.0 * static_cast<double>(c.tokens + 2);
    expect_close(actual.weight, expected.weight, {is_double, magnitude}, describe(c));
    if (c.has_bias) expect_close(actual.bias, expected.bias, {is_double, magnitude}, "bias");
  }
};

TEST_P(WeightGradient, EverySize) {
  // Around the tiles, the vectors and their tails, and pairs of tokens.
  for (const std::int64_t tokens : {1, 2, 3, 8}) {
    for (std::int64_t rows = 1; rows <= 18; ++rows) {
      for (std::int64_t cols = 1; cols <= 70; cols += rows % 3 == 0 ? 1 : 5) {
        check({.tokens = tokens, .out_features = rows, .in_features = cols});
        check({.tokens = tokens,
               .out_features = rows,
               .in_features = cols,
               .grad_type = ScalarType::kFloat32,
               .input_type = ScalarType::kFloat32,
               .beta = 0.0});
      }
    }
  }
}

TEST_P(WeightGradient, EveryMixOfDtypes) {
  for (const ScalarType weight : kListDtypes) {
    for (const ScalarType grad : kListDtypes) {
      for (const ScalarType input : kListDtypes) {
        for (const double beta : {1.0, 0.0, 0.5}) {
          check({.tokens = 11,
                 .out_features = 21,
                 .in_features = 83,
                 .weight_type = weight,
                 .grad_type = grad,
                 .input_type = input,
                 .bias_type = weight == ScalarType::kFloat16 ? ScalarType::kFloat64 : weight,
                 .beta = beta});
        }
      }
    }
  }
}

TEST_P(WeightGradient, Layouts) {
  using enum MatrixLayout;
  for (const ScalarType type : kListDtypes) {
    for (const MatrixLayout weight : {kDense, kPadded, kTransposed, kEverySecond}) {
      for (const MatrixLayout grad :
           {kDense, kPadded, kTransposed, kEverySecond, kRowsRepeated, kOneElement}) {
        for (const MatrixLayout input : {kDense, kPadded, kTransposed, kRowsRepeated}) {
          for (const double beta : {1.0, 0.0, 2.0}) {
            check({.tokens = 5,
                   .out_features = 19,
                   .in_features = 53,
                   .weight_type = type == ScalarType::kFloat64 ? type : ScalarType::kFloat32,
                   .grad_type = type,
                   .input_type = type,
                   .weight_layout = weight,
                   .grad_layout = grad,
                   .input_layout = input,
                   .bias_stride = beta == 1.0 ? 1 : 3,
                   .beta = beta});
          }
        }
      }
    }
  }
}

TEST_P(WeightGradient, UnalignedAddresses) {
  for (const std::int64_t shift : {1, 2, 4, 12}) {
    for (const ScalarType type : kListDtypes) {
      check({.out_features = 17,
             .in_features = 75,
             .grad_type = type,
             .input_type = type,
             .side = GuardSide::kFront,
             .shift = shift});
    }
  }
}

TEST_P(WeightGradient, MoreTokensThanAPanel) {
  for (const std::int64_t tokens : {255, 256, 257, 513, 700}) {
    for (const ScalarType type :
         {ScalarType::kBFloat16, ScalarType::kFloat32, ScalarType::kFloat64}) {
      check({.tokens = tokens,
             .out_features = 33,
             .in_features = 70,
             .grad_type = type,
             .input_type = type});
      check({.tokens = tokens,
             .out_features = 9,
             .in_features = 40,
             .weight_type = ScalarType::kBFloat16,
             .grad_type = type,
             .input_type = type,
             .beta = 0.0});
    }
  }
}

TEST_P(WeightGradient, LargerThanOneTask) {
  for (const ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat32}) {
    for (const double beta : {1.0, 0.0}) {
      check({.tokens = 20,
             .out_features = 261,
             .in_features = 1100,
             .grad_type = type,
             .input_type = type,
             .beta = beta},
            ThreadTaskRunner(3));
      check({.tokens = 9,
             .out_features = 150,
             .in_features = 700,
             .weight_type = ScalarType::kBFloat16,
             .grad_type = type,
             .input_type = type,
             .weight_layout = MatrixLayout::kTransposed,
             .beta = beta},
            ThreadTaskRunner(2));
    }
  }
}

TEST_P(WeightGradient, EveryThreadCountGivesTheSameBits) {
  for (const ScalarType type : kListDtypes) {
    for (const std::int64_t tokens : {3, 270}) {
      for (const ScalarType weight_type : {ScalarType::kFloat32, ScalarType::kBFloat16}) {
        const WeightGradientCase c{.tokens = tokens,
                                   .out_features = 150,
                                   .in_features = 700,
                                   .weight_type = weight_type,
                                   .grad_type = type,
                                   .input_type = type};
        const std::vector<std::uint8_t> expected = run(c).bytes();
        for (int workers = 1; workers <= 7; ++workers) {
          EXPECT_TRUE(
              run(c, ThreadTaskRunner(workers, 5u + static_cast<unsigned>(workers))).bytes() ==
              expected)
              << describe(c) << ", " << workers << " threads";
          EXPECT_TRUE(run(c, ReversedTaskRunner(workers)).bytes() == expected);
        }
      }
    }
  }
}

TEST_P(WeightGradient, WithoutTokens) {
  for (const double beta : {1.0, 0.0, 0.5}) {
    for (const ScalarType type : kListDtypes) {
      check({.tokens = 0,
             .out_features = 20,
             .in_features = 37,
             .weight_type = type,
             .grad_type = type,
             .input_type = type,
             .beta = beta});
    }
  }
}

TEST_P(WeightGradient, ZeroFeatures) {
  check({.tokens = 4, .out_features = 0, .in_features = 5});
  check({.tokens = 4, .out_features = 5, .in_features = 0});  // the bias is summed all the same
  check({.tokens = 4, .out_features = 5, .in_features = 0, .beta = 0.0});
  check({.tokens = 0, .out_features = 0, .in_features = 0});
}

TEST_P(WeightGradient, SmallAddendsSurviveInFloat) {
  // In bf16 alone 256 + 1 - 256 is 0.
  for (const std::int64_t cols : {1, 16, 40}) {
    const WeightGradientCase c{.tokens = 1, .out_features = 3, .in_features = cols, .beta = 0.0};
    WeightGradientTensors tensors(c);
    tensors.input.fill([](std::int64_t) { return 1.0; });
    WeightGradientParams params = tensors.params(c);
    GuardedBuffer workspace(kernel().weight_gradient_workspace(params, 1), GuardSide::kBack, 64);
    for (const double value : {256.0, 1.0, -256.0}) {
      tensors.grad.fill([value](std::int64_t) { return value; });
      kernel().weight_gradient(params, SerialTaskRunner(), workspace.data());
      params.beta = 1.0;
    }
    for (std::int64_t i = 0; i < tensors.weight.count(); ++i) ASSERT_EQ(tensors.weight.get(i), 1.0);
    for (std::int64_t i = 0; i < 3; ++i) ASSERT_EQ(tensors.bias.get(i), 1.0);
  }
}

TEST_P(WeightGradient, NonFiniteGradientsStayInTheirRow) {
  for (const ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat32}) {
    const WeightGradientCase c{
        .tokens = 3, .out_features = 12, .in_features = 40, .grad_type = type, .input_type = type};
    const WeightGradientTensors tensors(c);
    tensors.grad.set(1 * 12 + 5, kNan);
    const WeightGradientParams params = tensors.params(c);
    GuardedBuffer workspace(kernel().weight_gradient_workspace(params, 1), GuardSide::kBack, 64);
    kernel().weight_gradient(params, SerialTaskRunner(), workspace.data());
    for (std::int64_t i = 0; i < tensors.weight.count(); ++i) {
      ASSERT_EQ(std::isnan(tensors.weight.get(i)), i / 40 == 5) << i;
    }
  }
}

TORCH_EXT_TEST_EACH_ISA(WeightGradient);

}  // namespace
}  // namespace torch_ext::testing
