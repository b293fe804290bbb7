// One element of any dtype as a double, and back with one rounding: the reference never rounds
// twice.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../strided_view.h"

namespace torch_ext::reference {

/// A 16-bit IEEE-like format: sign, exponent, `mantissa_bits` stored bits.
struct HalfFormat {
  int mantissa_bits;
  int min_exponent;  // of normal numbers
  int max_exponent;
};

inline constexpr HalfFormat kBFloat16Format{7, -126, 127};
inline constexpr HalfFormat kFloat16Format{10, -14, 15};

inline double decode_half(std::uint16_t bits, HalfFormat format) {
  const int magnitude = bits & 0x7FFF;
  const int exponent_field = magnitude >> format.mantissa_bits;
  const int mantissa = magnitude & ((1 << format.mantissa_bits) - 1);
  double value;
  if (exponent_field > format.max_exponent - format.min_exponent + 1) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent_field == 0) {
    value = std::ldexp(mantissa, format.min_exponent - format.mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1 << format.mantissa_bits),
                       format.min_exponent + exponent_field - 1 - format.mantissa_bits);
  }
  return bits & 0x8000 ? -value : value;
}

/// Round to nearest, ties to even; overflow gives infinity, as hardware conversions do.
inline std::uint16_t encode_half(double value, HalfFormat format) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = (format.max_exponent - format.min_exponent + 2) << format.mantissa_bits;
  if (std::isnan(value)) {
    return static_cast<std::uint16_t>(sign | infinity | 1 << (format.mantissa_bits - 1));
  }
  const double magnitude = std::fabs(value);
  if (magnitude == 0.0) return static_cast<std::uint16_t>(sign);
  if (magnitude >= std::ldexp(1.0, format.max_exponent + 1)) {
    return static_cast<std::uint16_t>(sign | infinity);
  }
  int exponent = std::ilogb(magnitude);
  if (exponent < format.min_exponent) exponent = format.min_exponent;
  // In units of the last place. The implicit bit of a normal number adds one to the exponent field,
  // and so does a mantissa that rounds up to the next power of two.
  const double units = std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent));
  const int field = (exponent - format.min_exponent) << format.mantissa_bits;
  return static_cast<std::uint16_t>(sign | (field + static_cast<int>(units)));
}

template <typename Storage>
Storage read_raw(const void* data, std::int64_t offset) {
  Storage raw;
  std::memcpy(&raw, static_cast<const char*>(data) + offset * std::int64_t{sizeof(Storage)},
              sizeof(Storage));
  return raw;
}

template <typename Storage>
void write_raw(void* data, std::int64_t offset, Storage raw) {
  std::memcpy(static_cast<char*>(data) + offset * std::int64_t{sizeof(Storage)}, &raw,
              sizeof(Storage));
}

/// `offset` counts elements.
inline double load_element(const void* data, std::int64_t offset, ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return read_raw<float>(data, offset);
    case ScalarType::kFloat64:
      return read_raw<double>(data, offset);
    case ScalarType::kBFloat16:
      return decode_half(read_raw<std::uint16_t>(data, offset), kBFloat16Format);
    case ScalarType::kFloat16:
      return decode_half(read_raw<std::uint16_t>(data, offset), kFloat16Format);
    case ScalarType::kBool:
      return read_raw<std::uint8_t>(data, offset) != 0 ? 1.0 : 0.0;
    case ScalarType::kInt8:
    case ScalarType::kFloat8E4M3:
      break;  // of caches, which the reference does not read
  }
  return 0.0;
}

inline void store_element(void* data, std::int64_t offset, ScalarType type, double value) {
  switch (type) {
    case ScalarType::kFloat32:
      return write_raw(data, offset, static_cast<float>(value));
    case ScalarType::kFloat64:
      return write_raw(data, offset, value);
    case ScalarType::kBFloat16:
      return write_raw(data, offset, encode_half(value, kBFloat16Format));
    case ScalarType::kFloat16:
      return write_raw(data, offset, encode_half(value, kFloat16Format));
    case ScalarType::kBool:
      return write_raw(data, offset, static_cast<std::uint8_t>(value != 0.0));
    case ScalarType::kInt8:
    case ScalarType::kFloat8E4M3:
      break;
  }
}

}  // namespace torch_ext::reference
