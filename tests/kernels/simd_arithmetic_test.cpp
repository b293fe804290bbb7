// exp2, conversions and the random generator of each instruction set, against exact or scalar
// twins.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/counter_rng.h"
#include "kernels/reference/element_access.h"
#include "simd_pieces.h"

namespace torch_ext::testing {
namespace {

using reference::decode_half;
using reference::encode_half;
using reference::HalfFormat;
using reference::kBFloat16Format;
using reference::kFloat16Format;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

class SimdArithmetic : public ::testing::TestWithParam<NamedSimdPieces> {
 protected:
  const SimdPieces& pieces() const { return *GetParam().pieces; }

  /// `convert` on all of `input`, a vector at a time; the tail is filled up.
  template <typename From, typename To>
  std::vector<To> each(void (*convert)(const From*, To*), std::vector<From> input) const {
    const std::size_t lanes =
        static_cast<std::size_t>(sizeof(To) == 8 ? pieces().double_lanes : pieces().float_lanes);
    const std::size_t count = input.size();
    input.resize((count + lanes - 1) / lanes * lanes);
    std::vector<To> result(input.size());
    for (std::size_t i = 0; i < input.size(); i += lanes) convert(&input[i], &result[i]);
    result.resize(count);
    return result;
  }

  std::vector<float> exp2_of(int degree, const std::vector<float>& input) const {
    const std::size_t lanes = static_cast<std::size_t>(pieces().float_lanes);
    std::vector<float> padded = input;
    padded.resize((input.size() + lanes - 1) / lanes * lanes);
    std::vector<float> result(padded.size());
    for (std::size_t i = 0; i < padded.size(); i += lanes) {
      pieces().exp2_float(degree, &padded[i], &result[i]);
    }
    result.resize(input.size());
    return result;
  }
};

/// Every size, both signs, the ends of the type and NaN.
template <typename T, typename Tanh>
void expect_tanh(const Tanh& tanh_of, double ulps) {
  std::vector<T> x{T{0}, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::max(),
                   std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()};
  std::mt19937 engine(3);
  std::uniform_real_distribution<double> exponent(-40.0, 6.0);
  for (int i = 0; i < 200000; ++i) x.push_back(static_cast<T>(std::exp2(exponent(engine))));
  const std::size_t positive = x.size();
  for (std::size_t i = 0; i < positive; ++i) x.push_back(-x[i]);
  const std::vector<T> result = tanh_of(x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double exact = std::tanh(static_cast<long double>(x[i]));
    if (std::isnan(x[i]) || exact == 0) {
      ASSERT_EQ(std::isnan(result[i]), std::isnan(x[i]));
      ASSERT_TRUE(std::isnan(x[i]) || result[i] == 0);
      continue;
    }
    const auto bound = ulps * std::numeric_limits<T>::epsilon();
    ASSERT_LE(std::fabs(static_cast<double>(result[i] / exact - 1)), bound) << "tanh " << x[i];
  }
}

TEST_P(SimdArithmetic, TanhWithinAFewUlp) {
  expect_tanh<float>([&](const auto& x) { return each(pieces().tanh_float, x); }, 4.0);
  expect_tanh<double>([&](const auto& x) { return each(pieces().tanh_double, x); }, 4.0);
}

TEST_P(SimdArithmetic, Exp2OfFloats) {
  std::vector<float> x;
  for (int i = -125; i <= 9; ++i) {
    for (const float step : {0.0f, 0.5f, 0.25f, 1e-3f}) {
      x.push_back(static_cast<float>(i) + step);
      x.push_back(std::nextafter(x.back(), kInfinity));
      x.push_back(std::max(std::nextafter(x.back(), -kInfinity), -125.0f));
    }
  }
  std::mt19937 engine(1);
  std::uniform_real_distribution<float> uniform(-125.0f, 10.0f);
  for (int i = 0; i < 200000; ++i) x.push_back(uniform(engine));
  // The polynomials' errors (7.5e-8 and 7.5e-5) and the rounding of some steps of evaluation.
  for (const auto& [degree, bound] : {std::pair{5, 2.5e-7}, {3, 7.6e-5}}) {
    const std::vector<float> result = exp2_of(degree, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const long double exact = std::exp2(static_cast<long double>(x[i]));
      ASSERT_LE(std::fabs(static_cast<double>(result[i] / exact - 1)), bound)
          << "2^" << x[i] << " in degree " << degree;
    }
  }
}

TEST_P(SimdArithmetic, Exp2OfDoubles) {
  std::vector<double> x;
  for (int i = -1021; i <= 9; ++i) {
    for (const double step : {0.0, 0.5, 0.25, 1e-9}) x.push_back(i + step);
  }
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(-1021.0, 10.0);
  for (int i = 0; i < 100000; ++i) x.push_back(uniform(engine));
  const std::vector<double> result = each<double, double>(pieces().exp2_double, x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double exact = std::exp2(static_cast<long double>(x[i]));
    ASSERT_LE(std::fabs(static_cast<double>(result[i] / exact - 1)), 4e-16) << "2^" << x[i];
  }
}

TEST_P(SimdArithmetic, Exp2BeyondItsRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int degree : {3, 5}) {
    const std::vector<float> result =
        exp2_of(degree, {-126.5f, -200.0f, -1e30f, -kInfinity, nan, -nan,
                         float_of_bits(0xFFFFFFFFu), float_of_bits(0x7FC00155u)});
    for (int i = 0; i < 4; ++i) {
      EXPECT_GE(result[i], 0.0f);
      EXPECT_LE(result[i], 0x1.01p-125f);
    }
    for (int i = 4; i < 8; ++i) EXPECT_TRUE(std::isnan(result[i]));
  }
  const std::vector<double> result = each<double, double>(
      pieces().exp2_double,
      {-1022.5, -1e300, -static_cast<double>(kInfinity), std::numeric_limits<double>::quiet_NaN()});
  for (int i = 0; i < 3; ++i) {
    EXPECT_GE(result[i], 0.0);
    EXPECT_LE(result[i], 0x1.01p-1021);
  }
  EXPECT_TRUE(std::isnan(result[3]));
}

std::vector<std::uint16_t> all_halves() {
  std::vector<std::uint16_t> bits(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<std::uint16_t>(i);
  return bits;
}

void expect_decoded(const std::vector<float>& result, HalfFormat format) {
  for (int bits = 0; bits < 65536; ++bits) {
    const double expected = decode_half(static_cast<std::uint16_t>(bits), format);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(result[bits])) << std::hex << bits;
    } else {
      ASSERT_EQ(bits_of_float(result[bits]), bits_of_float(static_cast<float>(expected)))
          << std::hex << bits;
    }
  }
}

TEST_P(SimdArithmetic, Bf16ToFloat) {
  expect_decoded(each(pieces().bf16_to_float, all_halves()), kBFloat16Format);
}

TEST_P(SimdArithmetic, Fp16ToFloat) {
  expect_decoded(each(pieces().fp16_to_float, all_halves()), kFloat16Format);
}

/// All values of a format, the middles between neighbours and their neighbours, and any floats.
std::vector<float> floats_to_round(HalfFormat format) {
  std::vector<float> x;
  for (int bits = 0; bits < 65535; ++bits) {
    const double low = decode_half(static_cast<std::uint16_t>(bits), format);
    const double high = decode_half(static_cast<std::uint16_t>(bits + 1), format);
    x.push_back(static_cast<float>(low));
    const float middle = static_cast<float>(low + (high - low) / 2);
    x.push_back(middle);
    x.push_back(std::nextafter(middle, kInfinity));
    x.push_back(std::nextafter(middle, -kInfinity));
  }
  std::mt19937 engine(3);
  for (int i = 0; i < 300000; ++i) x.push_back(float_of_bits(static_cast<std::uint32_t>(engine())));
  for (const std::uint32_t bits : {0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0xFF800001u, 0x7F7FFFFFu,
                                   0xFF7FFFFFu, 0x00000001u, 0x80000001u, 0x807FFFFFu}) {
    x.push_back(float_of_bits(bits));
  }
  return x;
}

void expect_encoded(const std::vector<float>& x, const std::vector<std::uint16_t>& result,
                    HalfFormat format) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      ASSERT_TRUE(std::isnan(decode_half(result[i], format))) << std::hex << bits_of_float(x[i]);
    } else {
      ASSERT_EQ(result[i], encode_half(x[i], format)) << x[i];
    }
  }
}

TEST_P(SimdArithmetic, FloatToBf16) {
  const std::vector<float> x = floats_to_round(kBFloat16Format);
  expect_encoded(x, each(pieces().float_to_bf16, x), kBFloat16Format);
}

TEST_P(SimdArithmetic, FloatToFp16) {
  const std::vector<float> x = floats_to_round(kFloat16Format);
  expect_encoded(x, each(pieces().float_to_fp16, x), kFloat16Format);
}

TEST_P(SimdArithmetic, PacksBf16PairsLowFirst) {
  if (pieces().pack_bf16_pairs == nullptr) return;  // no pairs on this instruction set
  std::vector<float> x = floats_to_round(kBFloat16Format);
  const std::size_t lanes = static_cast<std::size_t>(pieces().float_lanes);
  x.resize(x.size() / (2 * lanes) * (2 * lanes));
  std::vector<float> low, high;
  std::vector<std::uint16_t> low_bits, high_bits;
  std::vector<std::uint32_t> pairs(lanes);
  for (std::size_t i = 0; i < x.size(); i += 2 * lanes) {
    pieces().pack_bf16_pairs(&x[i], &x[i + lanes], pairs.data());
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      // vcvtneps2bf16 takes subnormals for zeros.
      if (std::fpclassify(x[i + lane]) == FP_SUBNORMAL) continue;
      if (std::fpclassify(x[i + lanes + lane]) == FP_SUBNORMAL) continue;
      low.push_back(x[i + lane]);
      high.push_back(x[i + lanes + lane]);
      low_bits.push_back(static_cast<std::uint16_t>(pairs[lane]));
      high_bits.push_back(static_cast<std::uint16_t>(pairs[lane] >> 16));
    }
  }
  expect_encoded(low, low_bits, kBFloat16Format);
  expect_encoded(high, high_bits, kBFloat16Format);
}

TEST_P(SimdArithmetic, PhiloxOfItsScalarTwin) {
  const std::size_t lanes = static_cast<std::size_t>(pieces().float_lanes);
  std::mt19937_64 engine(5);
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<std::uint32_t> counter(4 * lanes);
    for (std::uint32_t& word : counter) word = static_cast<std::uint32_t>(engine());
    const std::uint64_t seed = engine();
    std::vector<std::uint32_t> result = counter;
    pieces().philox(result.data(), seed);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const PhiloxBlock expected =
          philox4x32_10({{counter[lane], counter[lanes + lane], counter[2 * lanes + lane],
                          counter[3 * lanes + lane]}},
                        seed);
      for (std::size_t word = 0; word < 4; ++word) {
        ASSERT_EQ(result[word * lanes + lane], expected.word[word]);
      }
    }
  }
}

TEST_P(SimdArithmetic, DropoutBitsOfItsScalarTwin) {
  constexpr std::uint64_t kSeed = 0xFEDCBA9876543210u;
  constexpr std::uint32_t kThreshold = dropout_threshold(0.37);
  constexpr std::int64_t kStride = 96;
  for (const auto& [queries, keys, first_query, first_key] :
       {std::array<std::int64_t, 4>{1, 1, 0, 0},
        {5, 40, 3, 8},
        {17, 96, 1000, 64},
        {33, 33, 0, 4096}}) {
    const std::int64_t lanes = pieces().float_lanes;
    // Rows are written in whole vectors of queries.
    std::vector<std::uint16_t> bits(static_cast<std::size_t>((queries + lanes) * kStride), 0x5A5A);
    pieces().dropout_bits_of_keys(bits.data(), kStride, queries, keys, first_query, first_key, 9,
                                  kSeed);
    for (std::int64_t query = 0; query < queries; ++query) {
      for (std::int64_t key = 0; key < keys; ++key) {
        ASSERT_EQ(bits[static_cast<std::size_t>(query * kStride + key)] >= kThreshold,
                  dropout_keeps(kSeed, kThreshold, 9, first_query + query, first_key + key))
            << query << " " << key;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EachIsa, SimdArithmetic, ::testing::ValuesIn(simd_pieces_under_test()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torch_ext::testing
