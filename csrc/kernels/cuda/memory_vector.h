// Elements in memory, one at a time and 16 bytes at a time, on the device and, for the tests, on
// the host, where a misaligned access ends the program.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../strided_view.h"
#include "device_program.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstdlib>
#include <cstring>

#include "../reference/element_access.h"
#endif

namespace torch_ext::cuda {

inline constexpr int kVectorBytes = 16;  // of the widest access

constexpr int bytes_of(ScalarType type) { return static_cast<int>(element_size(type)); }

/// Arithmetic in double where an operand is double, else in float.
constexpr bool is_double(ScalarType type) { return type == ScalarType::kFloat64; }

template <int kBytes>
struct alignas(kBytes) MemoryVector {
  static_assert(kBytes == 8 || kBytes == 16);
  std::uint32_t words[kBytes / 4];
};

template <typename T>
TORCH_EXT_DEVICE T* element_at(T* data, std::int64_t offset, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + offset * bytes;
}

#if defined(__CUDACC__)

/// kBytes at an address that is a multiple of kBytes.
template <int kBytes>
TORCH_EXT_DEVICE MemoryVector<kBytes> load_vector(const void* source) {
  return *static_cast<const MemoryVector<kBytes>*>(source);
}

/// The same, of what is read once: it is the first to leave the caches.
template <int kBytes>
TORCH_EXT_DEVICE MemoryVector<kBytes> load_vector_once(const void* source) {
  MemoryVector<kBytes> result;
  if constexpr (kBytes == 16) {
    const uint4 bits = __ldcs(static_cast<const uint4*>(source));
    result = {{bits.x, bits.y, bits.z, bits.w}};
  } else {
    const uint2 bits = __ldcs(static_cast<const uint2*>(source));
    result = {{bits.x, bits.y}};
  }
  return result;
}

template <int kBytes>
TORCH_EXT_DEVICE void store_vector(void* target, const MemoryVector<kBytes>& bits) {
  *static_cast<MemoryVector<kBytes>*>(target) = bits;
}

template <typename Storage>
TORCH_EXT_DEVICE Storage read_raw(const void* data, std::int64_t offset) {
  return static_cast<const Storage*>(data)[offset];
}
template <typename Storage>
TORCH_EXT_DEVICE void write_raw(void* data, std::int64_t offset, Storage raw) {
  static_cast<Storage*>(data)[offset] = raw;
}

TORCH_EXT_DEVICE float float_of_bits(std::uint32_t bits) { return __uint_as_float(bits); }
TORCH_EXT_DEVICE std::uint32_t bits_of_float(float x) { return __float_as_uint(x); }
TORCH_EXT_DEVICE double double_of_bits(std::uint32_t low, std::uint32_t high) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

TORCH_EXT_DEVICE float widen_bfloat16(std::uint16_t bits) {
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}
TORCH_EXT_DEVICE float widen_float16(std::uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
TORCH_EXT_DEVICE std::uint16_t narrow_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
TORCH_EXT_DEVICE std::uint16_t narrow_float16(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

#else

template <int kBytes>
MemoryVector<kBytes> load_vector(const void* source) {
  if (reinterpret_cast<std::uintptr_t>(source) % kBytes != 0) std::abort();
  MemoryVector<kBytes> result;
  std::memcpy(&result, source, kBytes);
  return result;
}

template <int kBytes>
MemoryVector<kBytes> load_vector_once(const void* source) {
  return load_vector<kBytes>(source);
}

template <int kBytes>
void store_vector(void* target, const MemoryVector<kBytes>& bits) {
  if (reinterpret_cast<std::uintptr_t>(target) % kBytes != 0) std::abort();
  std::memcpy(target, &bits, kBytes);
}

// Tensors of the tests lie at odd addresses too.
using reference::read_raw;
using reference::write_raw;

inline float float_of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double double_of_bits(std::uint32_t low, std::uint32_t high) {
  const std::uint64_t bits = std::uint64_t{high} << 32 | low;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen_bfloat16(std::uint16_t bits) {
  return static_cast<float>(reference::decode_half(bits, reference::kBFloat16Format));
}
inline float widen_float16(std::uint16_t bits) {
  return static_cast<float>(reference::decode_half(bits, reference::kFloat16Format));
}
inline std::uint16_t narrow_bfloat16(float x) {
  return reference::encode_half(x, reference::kBFloat16Format);
}
inline std::uint16_t narrow_float16(float x) {
  return reference::encode_half(x, reference::kFloat16Format);
}

#endif

/// `offset` counts elements; T is float or double.
template <typename T>
TORCH_EXT_DEVICE T load_scalar(const void* data, std::int64_t offset, ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return static_cast<T>(read_raw<float>(data, offset));
    case ScalarType::kFloat64:
      return static_cast<T>(read_raw<double>(data, offset));
    case ScalarType::kBFloat16:
      return static_cast<T>(widen_bfloat16(read_raw<std::uint16_t>(data, offset)));
    default:
      return static_cast<T>(widen_float16(read_raw<std::uint16_t>(data, offset)));
  }
}

template <typename T>
TORCH_EXT_DEVICE void store_scalar(void* data, std::int64_t offset, ScalarType type, T value) {
  switch (type) {
    case ScalarType::kFloat32:
      write_raw(data, offset, static_cast<float>(value));
      return;
    case ScalarType::kFloat64:
      write_raw(data, offset, static_cast<double>(value));
      return;
    case ScalarType::kBFloat16:
      write_raw(data, offset, narrow_bfloat16(static_cast<float>(value)));
      return;
    default:
      write_raw(data, offset, narrow_float16(static_cast<float>(value)));
      return;
  }
}

/// As store_scalar() and load_scalar() after it.
template <typename T>
TORCH_EXT_DEVICE T rounded_to(T value, ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return static_cast<T>(static_cast<float>(value));
    case ScalarType::kFloat64:
      return value;
    case ScalarType::kBFloat16:
      return static_cast<T>(widen_bfloat16(narrow_bfloat16(static_cast<float>(value))));
    default:
      return static_cast<T>(widen_float16(narrow_float16(static_cast<float>(value))));
  }
}

/// kCount elements of a vector as floats. The type is float, bfloat16 or float16.
template <int kCount, int kBytes>
TORCH_EXT_DEVICE void widen(const MemoryVector<kBytes>& bits, ScalarType type,
                            float (&values)[kCount]) {
  if (type == ScalarType::kFloat32) {
    TORCH_EXT_UNROLL
    for (int i = 0; i < min_of(kCount, kBytes / 4); ++i) values[i] = float_of_bits(bits.words[i]);
    return;
  }
  TORCH_EXT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const auto half = static_cast<std::uint16_t>(bits.words[i / 2] >> i % 2 * 16);
    values[i] = type == ScalarType::kBFloat16 ? widen_bfloat16(half) : widen_float16(half);
  }
}

template <int kCount, int kBytes>
TORCH_EXT_DEVICE void narrow(const float (&values)[kCount], ScalarType type,
                             MemoryVector<kBytes>& bits) {
  if (type == ScalarType::kFloat32) {
    TORCH_EXT_UNROLL
    for (int i = 0; i < min_of(kCount, kBytes / 4); ++i) bits.words[i] = bits_of_float(values[i]);
    return;
  }
  TORCH_EXT_UNROLL
  for (int i = 0; i < kCount; i += 2) {
    const bool is_bfloat16 = type == ScalarType::kBFloat16;
    const std::uint32_t low = is_bfloat16 ? narrow_bfloat16(values[i]) : narrow_float16(values[i]);
    const std::uint32_t high =
        is_bfloat16 ? narrow_bfloat16(values[i + 1]) : narrow_float16(values[i + 1]);
    bits.words[i / 2] = high << 16 | low;
  }
}

/// The one element of a scalar operand, or `otherwise` where it is not given.
template <typename T, typename ScalarOperand>
TORCH_EXT_DEVICE T scalar_operand(const ScalarOperand& operand, T otherwise) {
  return operand.data == nullptr ? otherwise : load_scalar<T>(operand.data, 0, operand.type);
}

}  // namespace torch_ext::cuda
