// Mini-batch kernels on tensors whose elements lie further apart than 2^31: every offset has to be
// computed in 64 bits. The address space is reserved, and only the pages that hold elements exist.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#include "kernels/cpu/embedding_groups.h"
#include "kernels/reference/element_access.h"
#include "kernels_under_test.h"
#include "list_tensor.h"

namespace torch_ext::testing {
namespace {

constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 3;

/// A (rows, cols) matrix with such strides.
class FarMatrix {
 public:
  FarMatrix(ScalarType type, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
            std::int64_t col_stride)
      : type_(type), rows_(rows), cols_(cols), row_stride_(row_stride), col_stride_(col_stride) {
    const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
    const auto width = static_cast<std::int64_t>(element_size(type));
    bytes_ = static_cast<std::size_t>((offset(rows - 1, cols - 1) + 1) * width + page);
    data_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        const std::int64_t begin = offset(row, col) * width / page * page;
        if (mprotect(data_ + begin, static_cast<std::size_t>(2 * page), PROT_READ | PROT_WRITE)) {
          throw std::bad_alloc();
        }
      }
    }
  }
  ~FarMatrix() { munmap(data_, bytes_); }
  FarMatrix(const FarMatrix&) = delete;
  FarMatrix& operator=(const FarMatrix&) = delete;

  void fill(std::uint64_t seed) const {
    for (std::int64_t i = 0; i < rows_ * cols_; ++i) {
      reference::store_element(data_, offset(i / cols_, i % cols_), type_, varied_number(seed, i));
    }
  }

  double get(std::int64_t row, std::int64_t col) const {
    return reference::load_element(data_, offset(row, col), type_);
  }

  Operand operand() const { return {data_, type_}; }
  ConstOperand const_operand() const { return {data_, type_}; }
  Matrix matrix() const { return {data_, type_, row_stride_, col_stride_}; }
  ConstMatrix const_matrix() const { return {data_, type_, row_stride_, col_stride_}; }

 private:
  std::int64_t offset(std::int64_t row, std::int64_t col) const {
    return row * row_stride_ + col * col_stride_;
  }

  ScalarType type_;
  std::int64_t rows_, cols_, row_stride_, col_stride_;
  std::size_t bytes_ = 0;
  char* data_ = nullptr;
};

constexpr std::int64_t kRows = 3;
constexpr std::int64_t kCols = 20;

class AccumulationFarOffsets : public KernelTest {};

TEST_P(AccumulationFarOffsets, Lists) {
  for (const ScalarType type : kListDtypes) {
    for (const bool far_cols : {false, true}) {
      const std::int64_t row_stride = far_cols ? 1 : kFar;
      const std::int64_t col_stride = far_cols ? kFar : 1;
      const FarMatrix accumulator(type, kRows, kCols, row_stride, col_stride);
      const FarMatrix grad(ScalarType::kFloat32, kRows, kCols, row_stride, col_stride);
      accumulator.fill(1);
      grad.fill(2);
      const std::int64_t sizes[] = {kRows, kCols};
      const std::int64_t strides[] = {row_stride, col_stride, row_stride, col_stride};
      const StridedLoop loop{2, sizes, strides};
      // Doubled: exact in every dtype.
      const AccumulateEntry entry{.count = kRows * kCols,
                                  .accumulator = accumulator.operand(),
                                  .grad = accumulator.const_operand(),
                                  .loop = loop};
      std::vector<double> before;
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        before.push_back(accumulator.get(i / kCols, i % kCols));
      }
      kernel().accumulate({.entries = &entry, .num_entries = 1}, SerialTaskRunner());
      double squares = 0.0;
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        const double doubled = 2.0 * before[static_cast<std::size_t>(i)];
        ASSERT_EQ(accumulator.get(i / kCols, i % kCols), doubled) << i;
        squares += doubled * doubled;
      }
      const GradStatsEntry stats_entry{
          .count = kRows * kCols, .grad = accumulator.const_operand(), .loop = loop};
      double norm = 0.0;
      double norms = 0.0;
      float found_inf = 2.0f;
      const GradStatsParams stats{.entries = &stats_entry,
                                  .num_entries = 1,
                                  .norm_type = ScalarType::kFloat64,
                                  .norm = &norm,
                                  .norms = &norms,
                                  .found_inf = &found_inf};
      GuardedBuffer workspace(kernel().grad_stats_workspace(stats), GuardSide::kBack, 64);
      kernel().grad_stats(stats, SerialTaskRunner(), workspace.data());
      EXPECT_NEAR(norm * norm, squares, 1e-9);
      EXPECT_EQ(found_inf, 0.0f);

      const SgdEntry sgd_entry{.count = kRows * kCols,
                               .param = accumulator.operand(),
                               .accumulator = grad.operand(),
                               .loop = loop};
      kernel().sgd_step({.entries = &sgd_entry, .num_entries = 1, .settings = {.lr = 0.0}},
                        SerialTaskRunner());
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        ASSERT_EQ(accumulator.get(i / kCols, i % kCols), 2.0 * before[static_cast<std::size_t>(i)]);
        ASSERT_EQ(grad.get(i / kCols, i % kCols), 0.0) << "reset of " << i;
      }
    }
  }
}

TEST_P(AccumulationFarOffsets, WeightGradients) {
  constexpr std::int64_t kTokens = 3;
  for (const ScalarType type : kListDtypes) {
    const ScalarType weight_type =
        type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
    for (const bool far_cols : {false, true}) {
      const std::int64_t row_stride = far_cols ? 1 : kFar;
      const std::int64_t col_stride = far_cols ? kFar : 1;
      const FarMatrix weight(weight_type, kRows, kCols, row_stride, col_stride);
      const FarMatrix grad(type, kTokens, kRows, row_stride, col_stride);
      const FarMatrix input(type, kTokens, kCols, row_stride, col_stride);
      const FarMatrix bias(weight_type, kRows, 1, kFar, 1);
      grad.fill(1);
      input.fill(2);
      const WeightGradientParams params{.tokens = kTokens,
                                        .out_features = kRows,
                                        .in_features = kCols,
                                        .weight_grad = weight.matrix(),
                                        .bias_grad = bias.operand(),
                                        .bias_stride = kFar,
                                        .grad_output = grad.const_matrix(),
                                        .input = input.const_matrix(),
                                        .beta = 0.0};
      GuardedBuffer workspace(kernel().weight_gradient_workspace(params, 1), GuardSide::kBack, 64);
      kernel().weight_gradient(params, SerialTaskRunner(), workspace.data());
      for (std::int64_t row = 0; row < kRows; ++row) {
        double bias_sum = 0.0;
        for (std::int64_t token = 0; token < kTokens; ++token) bias_sum += grad.get(token, row);
        EXPECT_NEAR(bias.get(row, 0), bias_sum, 1e-5);
        for (std::int64_t col = 0; col < kCols; ++col) {
          double sum = 0.0;
          for (std::int64_t token = 0; token < kTokens; ++token) {
            sum += grad.get(token, row) * input.get(token, col);
          }
          EXPECT_NEAR(weight.get(row, col), sum, 1e-5);
        }
      }

      const std::int64_t indices[] = {2, 0, 2};
      const EmbeddingGroups groups = group_by_row(indices, kTokens, kRows, -1);
      const EmbeddingGradientParams embedding{.num_embeddings = kRows,
                                              .dim = kCols,
                                              .weight_grad = weight.matrix(),
                                              .grad_output = input.const_matrix(),
                                              .num_rows = 2,
                                              .rows = groups.rows.data(),
                                              .starts = groups.starts.data(),
                                              .positions = groups.positions.data(),
                                              .beta = 0.0};
      kernel().embedding_gradient(embedding, SerialTaskRunner());
      for (std::int64_t col = 0; col < kCols; ++col) {
        EXPECT_EQ(weight.get(0, col), input.get(1, col));
        EXPECT_EQ(weight.get(1, col), 0.0);
        EXPECT_NEAR(weight.get(2, col), input.get(0, col) + input.get(2, col), 1e-6);
      }
    }
  }
}

TORCH_EXT_TEST_EACH_ISA(AccumulationFarOffsets);

}  // namespace
}  // namespace torch_ext::testing
