// Whether a bf16 tensor is the rounding of a float32 one.
#pragma once

#include <bit>
#include <cstdint>

namespace torch_ext {

/// To nearest, ties to even; every NaN to the quiet one: as torch rounds.
inline std::uint32_t bf16_bits_of(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

/// A loop without branches, which compilers make vectors of: it waits for memory.
inline bool is_bf16_copy(const float* values, const std::uint16_t* rounded, std::int64_t count) {
  std::uint32_t difference = 0;
  for (std::int64_t i = 0; i < count; ++i) difference |= bf16_bits_of(values[i]) ^ rounded[i];
  return difference == 0;
}

}  // namespace torch_ext
