#include "kernels/reference/element_access.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace torch_ext::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class HalfFormats : public ::testing::TestWithParam<HalfFormat> {};

TEST_P(HalfFormats, EveryEncodingSurvivesARoundTrip) {
  const HalfFormat format = GetParam();
  int not_a_number = 0;
  for (int bits = 0; bits < 65536; ++bits) {
    const double value = decode_half(static_cast<std::uint16_t>(bits), format);
    if (std::isnan(value)) {
      ++not_a_number;
      EXPECT_TRUE(std::isnan(decode_half(encode_half(value, format), format)));
      continue;
    }
    EXPECT_EQ(encode_half(value, format), bits) << value;
  }
  EXPECT_EQ(not_a_number, 2 * ((1 << format.mantissa_bits) - 1));
}

TEST_P(HalfFormats, RoundsToNearestAndTiesToEven) {
  const HalfFormat format = GetParam();
  const int infinity = (format.max_exponent - format.min_exponent + 2) << format.mantissa_bits;
  for (int bits = 0; bits + 1 < infinity; ++bits) {
    const double low = decode_half(static_cast<std::uint16_t>(bits), format);
    const double high = decode_half(static_cast<std::uint16_t>(bits + 1), format);
    const double middle = low + (high - low) / 2;
    const int even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(encode_half(middle, format), even) << middle;
    ASSERT_EQ(encode_half(std::nextafter(middle, -kInfinity), format), bits) << middle;
    ASSERT_EQ(encode_half(std::nextafter(middle, kInfinity), format), bits + 1) << middle;
    ASSERT_EQ(encode_half(-middle, format), even | 0x8000) << middle;
  }
}

TEST_P(HalfFormats, OverflowsToInfinityHalfAUnitAboveTheLargest) {
  const HalfFormat format = GetParam();
  const double beyond = std::ldexp(1.0, format.max_exponent + 1);
  const double half_unit = std::ldexp(1.0, format.max_exponent - format.mantissa_bits - 1);
  EXPECT_EQ(decode_half(encode_half(beyond - half_unit, format), format), kInfinity);
  EXPECT_EQ(decode_half(encode_half(std::nextafter(beyond - half_unit, 0.0), format), format),
            beyond - 2 * half_unit);
  EXPECT_EQ(decode_half(encode_half(-1e300, format), format), -kInfinity);
  EXPECT_EQ(decode_half(encode_half(kInfinity, format), format), kInfinity);
}

TEST_P(HalfFormats, KeepTheSignOfZero) {
  EXPECT_EQ(encode_half(-0.0, GetParam()), 0x8000);
  EXPECT_EQ(encode_half(-1e-300, GetParam()), 0x8000);
  EXPECT_TRUE(std::signbit(decode_half(0x8000, GetParam())));
}

INSTANTIATE_TEST_SUITE_P(Formats, HalfFormats, ::testing::Values(kBFloat16Format, kFloat16Format),
                         [](const auto& info) {
                           return info.param.mantissa_bits == 7 ? "BFloat16" : "Float16";
                         });

TEST(Half, KnownEncodings) {
  EXPECT_EQ(encode_half(1.0, kBFloat16Format), 0x3F80);
  EXPECT_EQ(encode_half(1.0, kFloat16Format), 0x3C00);
  EXPECT_EQ(encode_half(65504.0, kFloat16Format), 0x7BFF);
  EXPECT_EQ(encode_half(-2.0, kFloat16Format), 0xC000);
  EXPECT_EQ(decode_half(0x0001, kFloat16Format), 0x1p-24);
  EXPECT_EQ(decode_half(0x0001, kBFloat16Format), 0x1p-133);
}

TEST(ElementAccess, EveryTypeAtAnyAddress) {
  alignas(8) unsigned char memory[40];
  for (const ScalarType type :
       {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    store_element(memory + 1, 3, type, -1.5);
    EXPECT_EQ(load_element(memory + 1, 3, type), -1.5);
  }
  for (const int byte : {0, 1, 2, 255}) {
    memory[5] = static_cast<unsigned char>(byte);
    EXPECT_EQ(load_element(memory, 5, ScalarType::kBool), byte == 0 ? 0.0 : 1.0);
  }
}

}  // namespace
}  // namespace torch_ext::reference
