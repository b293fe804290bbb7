// Loads, stores, transposes and the contraction of each instruction set, against loops.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/reference/element_access.h"
#include "simd_pieces.h"

namespace torch_ext::testing {
namespace {

using reference::load_element;
using reference::store_element;

constexpr ScalarType kTypes[] = {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kBFloat16,
                                 ScalarType::kFloat16, ScalarType::kBool};

class SimdBlock : public ::testing::TestWithParam<NamedSimdPieces> {
 protected:
  const SimdPieces& pieces() const { return *GetParam().pieces; }
};

/// `count` elements of `stride` in a buffer of not a byte more.
class StridedRow {
 public:
  StridedRow(ScalarType type, std::int64_t stride, std::int64_t count, GuardSide side)
      : type_(type),
        stride_(stride),
        buffer_(static_cast<std::size_t>(count == 0 ? 0 : (count - 1) * std::abs(stride) + 1) *
                    element_size(type),
                side),
        first_(stride < 0 ? (count - 1) * -stride : 0) {}

  void* data() {
    return static_cast<char*>(buffer_.data()) +
           first_ * static_cast<std::int64_t>(element_size(type_));
  }
  double get(std::int64_t i) { return load_element(data(), i * stride_, type_); }
  void set(std::int64_t i, double value) { store_element(data(), i * stride_, type_, value); }
  GuardedBuffer& buffer() { return buffer_; }

 private:
  ScalarType type_;
  std::int64_t stride_;
  GuardedBuffer buffer_;
  std::int64_t first_;
};

template <typename T>
void expect_loads(int lanes,
                  void (*load)(const void*, ScalarType, std::int64_t, std::int64_t, T*)) {
  for (const ScalarType type : kTypes) {
    for (const std::int64_t stride : {1, 2, 7, 0, -1, -3}) {
      for (std::int64_t count = 1; count <= lanes; ++count) {
        for (const GuardSide side : {GuardSide::kBack, GuardSide::kFront}) {
          StridedRow row(type, stride, count, side);
          for (std::int64_t i = 0; i < count; ++i) row.set(i, i % 3 == 1 ? 0.0 : 1.5 - i);
          std::vector<T> result(static_cast<std::size_t>(lanes));
          load(row.data(), type, stride, count, result.data());
          for (std::int64_t i = 0; i < lanes; ++i) {
            // A bool is what a mask adds. Lanes beyond the count are 0, or masked.
            double expected = i < count ? row.get(i) : 0.0;
            if (type == ScalarType::kBool) {
              expected = expected != 0.0 ? 0.0 : -std::numeric_limits<double>::infinity();
            }
            ASSERT_EQ(static_cast<double>(result[static_cast<std::size_t>(i)]), expected)
                << "type " << static_cast<int>(type) << " stride " << stride << " lane " << i
                << " of " << count;
          }
        }
      }
    }
  }
}

TEST_P(SimdBlock, LoadsNothingButItsElements) {
  expect_loads<float>(pieces().float_lanes, pieces().load_floats);
  expect_loads<double>(pieces().double_lanes, pieces().load_doubles);
}

template <typename T, typename Store>
void expect_stores(ScalarType type, int lanes, const Store& store) {
  std::vector<T> values(static_cast<std::size_t>(lanes));
  for (int i = 0; i < lanes; ++i) values[static_cast<std::size_t>(i)] = static_cast<T>(i) - T{2.5};
  for (const std::int64_t stride : {1, 2, 7, -1, -3}) {
    for (std::int64_t count = 1; count <= lanes; ++count) {
      for (const GuardSide side : {GuardSide::kBack, GuardSide::kFront}) {
        StridedRow row(type, stride, count, side);
        store(row.data(), stride, count, values.data());
        ASSERT_TRUE(row.buffer().surroundings_intact());
        for (std::int64_t i = 0; i < count; ++i) {
          ASSERT_EQ(row.get(i), static_cast<double>(values[static_cast<std::size_t>(i)]));
        }
        // The gaps hold what they held.
        for (std::int64_t i = 0; i < count; ++i) {
          std::memset(static_cast<char*>(row.data()) +
                          i * stride * static_cast<std::int64_t>(element_size(type)),
                      GuardedBuffer::kPoison, element_size(type));
        }
        const auto* bytes = static_cast<const std::uint8_t*>(row.buffer().data());
        ASSERT_TRUE(GuardedBuffer::all_poison(bytes, bytes + row.buffer().size()));
      }
    }
  }
}

TEST_P(SimdBlock, StoresNothingButItsElements) {
  for (const ScalarType type :
       {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    expect_stores<float>(
        type, pieces().float_lanes,
        [&](void* target, std::int64_t stride, std::int64_t count, const float* x) {
          pieces().store_floats(target, type, stride, count, x);
        });
  }
  expect_stores<double>(ScalarType::kFloat64, pieces().double_lanes, pieces().store_doubles);
}

template <typename T>
void expect_transposed(int lanes, void (*transpose)(T*)) {
  std::vector<T> block(static_cast<std::size_t>(lanes * lanes));
  for (int i = 0; i < lanes * lanes; ++i) block[static_cast<std::size_t>(i)] = static_cast<T>(i);
  transpose(block.data());
  for (int row = 0; row < lanes; ++row) {
    for (int col = 0; col < lanes; ++col) {
      ASSERT_EQ(block[static_cast<std::size_t>(row * lanes + col)],
                static_cast<T>(col * lanes + row));
    }
  }
}

TEST_P(SimdBlock, Transposes) {
  expect_transposed<float>(pieces().float_lanes, pieces().transpose_floats);
  expect_transposed<double>(pieces().double_lanes, pieces().transpose_doubles);
}

TEST_P(SimdBlock, ReducesRows) {
  const int lanes = pieces().float_lanes;
  std::vector<float> block(static_cast<std::size_t>(lanes * lanes));
  std::vector<float> expected(static_cast<std::size_t>(lanes));
  for (int row = 0; row < lanes; ++row) {
    for (int col = 0; col < lanes; ++col) {
      const float value = static_cast<float>((row * 31 + col * 17) % 64);
      block[static_cast<std::size_t>(row * lanes + col)] = value;
      expected[static_cast<std::size_t>(row)] += value;
    }
  }
  std::vector<float> result(static_cast<std::size_t>(lanes));
  pieces().reduce_rows(block.data(), result.data());
  EXPECT_EQ(result, expected);
}

/// Small integers: every sum is exact, whatever its order.
class Integers {
 public:
  int next() { return static_cast<int>(engine_() % 15) - 7; }

 private:
  std::mt19937 engine_{11};
};

template <typename T, typename Contract>
void expect_contracted(int lanes, int max_vectors, const Contract& contract) {
  Integers integers;
  for (std::int64_t vectors = 1; vectors <= 2 * max_vectors + 1; ++vectors) {
    for (std::int64_t rows = 0; rows <= 35; ++rows) {
      for (const std::int64_t depth : {0, 1, 2, 7, 33}) {
        const bool transposed = (rows + depth) % 2 == 0;
        const std::int64_t row_stride = transposed ? 1 : depth + 3;
        const std::int64_t depth_stride = transposed ? rows + 2 : 1;
        const std::int64_t width = vectors * lanes;
        const std::int64_t stride = width + 5;
        std::vector<T> a(static_cast<std::size_t>((rows + 3) * (depth + 3)));
        std::vector<T> b(static_cast<std::size_t>(depth * stride));
        std::vector<T> c(static_cast<std::size_t>(rows * stride));
        for (T& x : a) x = static_cast<T>(integers.next());
        for (T& x : b) x = static_cast<T>(integers.next());
        for (T& x : c) x = static_cast<T>(integers.next());
        for (const bool accumulate : {false, true}) {
          std::vector<T> expected = c;
          for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < width; ++j) {
              T& sum = expected[static_cast<std::size_t>(i * stride + j)];
              if (!accumulate) sum = 0;
              for (std::int64_t k = 0; k < depth; ++k) {
                sum += a[static_cast<std::size_t>(i * row_stride + k * depth_stride)] *
                       b[static_cast<std::size_t>(k * stride + j)];
              }
            }
          }
          std::vector<T> result = c;
          contract(accumulate, rows, vectors, depth, a.data(), row_stride, depth_stride, b.data(),
                   stride, result.data(), stride);
          ASSERT_EQ(result, expected) << rows << " rows, " << vectors << " vectors, depth " << depth
                                      << (accumulate ? ", accumulated" : "");
        }
      }
    }
  }
}

TEST_P(SimdBlock, ContractsFloats) {
  expect_contracted<float>(pieces().float_lanes, pieces().max_vectors, pieces().contract_float);
}

TEST_P(SimdBlock, ContractsDoubles) {
  expect_contracted<double>(pieces().double_lanes, pieces().max_vectors, pieces().contract_double);
}

std::uint32_t pair_of(int low, int high) {
  const auto bits = [](int x) { return reference::encode_half(x, reference::kBFloat16Format); };
  return bits(low) | static_cast<std::uint32_t>(bits(high)) << 16;
}

TEST_P(SimdBlock, ContractsBf16Pairs) {
  if (pieces().contract_bf16_pairs == nullptr) return;  // no pairs on this instruction set
  const std::int64_t lanes = pieces().float_lanes;
  Integers integers;
  for (const std::int64_t vectors : {1, 2, 3, 5}) {
    for (const std::int64_t rows : {1, 3, 8, 15, 16, 29}) {
      for (const std::int64_t depth : {1, 2, 17}) {
        const std::int64_t width = vectors * lanes;
        std::vector<int> a(static_cast<std::size_t>(rows * depth * 2));
        std::vector<int> b(static_cast<std::size_t>(depth * 2 * width));
        for (int& x : a) x = integers.next();
        for (int& x : b) x = integers.next();
        std::vector<std::uint32_t> a_pairs, b_pairs;
        for (std::int64_t i = 0; i < rows * depth; ++i) {
          a_pairs.push_back(
              pair_of(a[static_cast<std::size_t>(2 * i)], a[static_cast<std::size_t>(2 * i + 1)]));
        }
        for (std::int64_t k = 0; k < depth; ++k) {
          for (std::int64_t j = 0; j < width; ++j) {
            b_pairs.push_back(pair_of(b[static_cast<std::size_t>(2 * k * width + j)],
                                      b[static_cast<std::size_t>((2 * k + 1) * width + j)]));
          }
        }
        std::vector<float> expected(static_cast<std::size_t>(rows * width), 3.0f);
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t j = 0; j < width; ++j) {
            for (std::int64_t k = 0; k < 2 * depth; ++k) {
              expected[static_cast<std::size_t>(i * width + j)] +=
                  static_cast<float>(a[static_cast<std::size_t>(i * 2 * depth + k)] *
                                     b[static_cast<std::size_t>(k * width + j)]);
            }
          }
        }
        std::vector<float> result(expected.size(), 3.0f);
        pieces().contract_bf16_pairs(true, rows, vectors, depth, a_pairs.data(), depth, 1,
                                     b_pairs.data(), width, result.data(), width);
        ASSERT_EQ(result, expected) << rows << " rows, " << vectors << " vectors, depth " << depth;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EachIsa, SimdBlock, ::testing::ValuesIn(simd_pieces_under_test()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torch_ext::testing
