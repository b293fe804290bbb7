// Elements in memory (fp32, fp64, bf16, fp16, bool) to compute vectors and back.

typedef std::uint16_t Uint16HalfVector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES / 2)));
typedef std::uint8_t Uint8FloatVector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES / 4)));
typedef float FloatHalfVector __attribute__((vector_size(TORCH_EXT_VECTOR_BYTES / 2)));

/// Zero-extended. By intrinsics where there are any: GCC 12 splits __builtin_convertvector into
/// halves and joins them again (measured at half the speed of decoding in bf16).
TORCH_EXT_INLINE Uint32Vector widen(Uint16HalfVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (Uint32Vector)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  return (Uint32Vector)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Uint32Vector);
#endif
}

TORCH_EXT_INLINE Uint32Vector widen_uint16(const void* source) {
  Uint16HalfVector bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return widen(bits);
}

/// The lower halves.
TORCH_EXT_INLINE Uint16HalfVector narrow(Uint32Vector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (Uint16HalfVector)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Uint16HalfVector);
#endif
}

TORCH_EXT_INLINE DoubleVector widen(FloatHalfVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (DoubleVector)_mm512_cvtps_pd((__m256)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  return (DoubleVector)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, DoubleVector);
#endif
}

/// Rounded to nearest even.
TORCH_EXT_INLINE FloatHalfVector narrow(DoubleVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  return (FloatHalfVector)_mm512_cvtpd_ps((__m512d)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  return (FloatHalfVector)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, FloatHalfVector);
#endif
}

TORCH_EXT_INLINE FloatVector bf16_to_float(const void* source) {
  return (FloatVector)(widen_uint16(source) << 16);
}

/// Round to nearest even; a NaN stays a (quiet) NaN.
TORCH_EXT_INLINE Uint32Vector float_to_bf16_bits(FloatVector x) {
  const Uint32Vector bits = (Uint32Vector)x;
  const Uint32Vector rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (x == x) ? rounded : (bits >> 16 | 0x40u);
}

TORCH_EXT_INLINE void float_to_bf16(void* target, FloatVector x) {
  const Uint16HalfVector bits = narrow(float_to_bf16_bits(x));
  __builtin_memcpy(target, &bits, sizeof bits);
}

TORCH_EXT_INLINE FloatVector fp16_to_float(const void* source) {
#if defined(TORCH_EXT_HAS_AVX512)
  __m256i bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return (FloatVector)_mm512_cvtph_ps(bits);
#elif defined(TORCH_EXT_HAS_AVX2)
  __m128i bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return (FloatVector)_mm256_cvtph_ps(bits);
#else
  // Exponent and mantissa moved up by 13 bits and rescaled by 2^112: exact, subnormals too. An
  // exponent of all ones (inf, NaN) is set to all ones again.
  const Uint32Vector bits = widen_uint16(source);
  const Uint32Vector magnitude = (bits & 0x7FFFu) << 13;
  const FloatVector scaled = (FloatVector)magnitude * 5.192296858534828e33f;
  const Uint32Vector special = (Uint32Vector)((bits & 0x7C00u) == 0x7C00u) & 0x7F800000u;
  return (FloatVector)((Uint32Vector)scaled | special | (bits & 0x8000u) << 16);
#endif
}

TORCH_EXT_INLINE void float_to_fp16(void* target, FloatVector x) {
#if defined(TORCH_EXT_HAS_AVX512)
  const __m256i bits = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(target, &bits, sizeof bits);
#elif defined(TORCH_EXT_HAS_AVX2)
  const __m128i bits = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(target, &bits, sizeof bits);
#else
  // F. Giesen, "float->half variants": round to nearest even by integer addition for normals, by
  // adding 0.5 (the ulp of the fp16 subnormals) for the rest.
  const Uint32Vector bits = (Uint32Vector)x;
  const Uint32Vector sign = bits & 0x80000000u;
  const Uint32Vector magnitude = bits ^ sign;
  const Uint32Vector special = ((Uint32Vector)(magnitude > 0x7F800000u) & 0x7E00u) |
                               ((Uint32Vector)(magnitude <= 0x7F800000u) & 0x7C00u);
  const Uint32Vector subnormal = (Uint32Vector)((FloatVector)magnitude + 0.5f) - 0x3F000000u;
  const Uint32Vector normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Uint32Vector finite = magnitude < 0x38800000u ? subnormal : normal;
  const Uint32Vector half = (magnitude >= 0x47800000u ? special : finite) | sign >> 16;
  const Uint16HalfVector narrowed = narrow(half);
  __builtin_memcpy(target, &narrowed, sizeof narrowed);
#endif
}

TORCH_EXT_INLINE FloatVector int8_to_float(const void* source) {
#if defined(TORCH_EXT_HAS_AVX512)
  __m128i bytes;
  __builtin_memcpy(&bytes, source, sizeof bytes);
  return (FloatVector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(TORCH_EXT_HAS_AVX2)
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
  return (FloatVector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  FloatVector result;
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    result[lane] = static_cast<float>(static_cast<const std::int8_t*>(source)[lane]);
  }
  return result;
#endif
}

/// By way of fp16, whose exponents are 8 larger: exact, subnormals too.
TORCH_EXT_INLINE FloatVector float8_to_float(const void* source) {
  Uint8FloatVector bytes;
  __builtin_memcpy(&bytes, source, sizeof bytes);
  const Uint16HalfVector wide = __builtin_convertvector(bytes, Uint16HalfVector);
  const Uint16HalfVector magnitude = wide & 0x7Fu;
  const Uint16HalfVector nan = (Uint16HalfVector)(magnitude == 0x7Fu) & 0x7E00u;
  const Uint16HalfVector half = magnitude << 7 | nan | (wide & 0x80u) << 8;
  return fp16_to_float(&half) * 256.0f;
}

/// Bytes between consecutive elements.
TORCH_EXT_INLINE std::int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
      return 8;
    case ScalarType::kFloat32:
      return 4;
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16:
      return 2;
    default:
      return 1;
  }
}

TORCH_EXT_INLINE const char* element_at(const void* data, ScalarType type, std::int64_t offset) {
  return static_cast<const char*>(data) + offset * bytes_of(type);
}

TORCH_EXT_INLINE char* element_at(void* data, ScalarType type, std::int64_t offset) {
  return static_cast<char*>(data) + offset * bytes_of(type);
}

/// kLanes contiguous elements. Bool gives 0 where true and -inf where false: what a mask adds.
template <typename T>
TORCH_EXT_INLINE Vec<T> load_elements(const void* source, ScalarType type) {
  if constexpr (sizeof(T) == 8) {
    if (type == ScalarType::kFloat64) return load<double>(source);
    FloatHalfVector half;
    if (type == ScalarType::kFloat32) {
      __builtin_memcpy(&half, source, sizeof half);
    } else if (type == ScalarType::kBool) {
      for (int lane = 0; lane < kDoubleLanes; ++lane) {
        half[lane] = static_cast<const std::uint8_t*>(source)[lane] ? 0.0f : -kInfinity<float>;
      }
    } else if (type == ScalarType::kInt8 || type == ScalarType::kFloat8E4M3) {
      std::uint8_t bytes[kFloatLanes] = {};
      __builtin_memcpy(bytes, source, kDoubleLanes);
      const FloatVector wide =
          type == ScalarType::kInt8 ? int8_to_float(bytes) : float8_to_float(bytes);
      __builtin_memcpy(&half, &wide, sizeof half);
    } else {
      std::uint16_t bits[kFloatLanes] = {};
      __builtin_memcpy(bits, source, kDoubleLanes * 2);
      const FloatVector wide =
          type == ScalarType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
      __builtin_memcpy(&half, &wide, sizeof half);
    }
    return widen(half);
  } else {
    switch (type) {
      case ScalarType::kFloat32:
        return load<float>(source);
      case ScalarType::kBFloat16:
        return bf16_to_float(source);
      case ScalarType::kFloat16:
        return fp16_to_float(source);
      case ScalarType::kBool: {
        Uint8FloatVector bytes;
        __builtin_memcpy(&bytes, source, sizeof bytes);
        const Int32Vector masked = __builtin_convertvector(bytes, Int32Vector) == 0;
        return (FloatVector)(masked & (Int32Vector)broadcast(-kInfinity<float>));
      }
      case ScalarType::kInt8:
        return int8_to_float(source);
      case ScalarType::kFloat8E4M3:
        return float8_to_float(source);
      case ScalarType::kFloat64: {
        FloatVector result;
        for (int lane = 0; lane < kFloatLanes; ++lane) {
          result[lane] = static_cast<float>(reinterpret_cast<const double*>(source)[lane]);
        }
        return result;
      }
    }
    __builtin_unreachable();
  }
}

/// `count` <= kLanes elements with any stride; the other lanes are 0. Reads nothing else.
template <typename T>
TORCH_EXT_INLINE Vec<T> load_elements(const void* source, ScalarType type, std::int64_t stride,
                                      std::int64_t count) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (stride == 1 && count >= kLanes) return load_elements<T>(source, type);
  // Gathered into a contiguous block of at most kLanes elements first.
  alignas(64) char gathered[kLanes * 8] = {};
  const std::int64_t bytes = bytes_of(type);
  const std::int64_t wanted = min_of(count, kLanes);
  if (stride == 1) {
    __builtin_memcpy(gathered, source, wanted * bytes);
  } else {
    for (std::int64_t i = 0; i < wanted; ++i) {
      __builtin_memcpy(gathered + i * bytes, static_cast<const char*>(source) + i * stride * bytes,
                       bytes);
    }
  }
  return load_elements<T>(gathered, type);
}

template <typename T>
TORCH_EXT_INLINE void store_elements(void* target, ScalarType type, Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    store<double>(target, x);  // double is computed for double only
  } else {
    switch (type) {
      case ScalarType::kBFloat16:
        return float_to_bf16(target, x);
      case ScalarType::kFloat16:
        return float_to_fp16(target, x);
      default:
        return store<float>(target, x);
    }
  }
}

/// `count` <= kLanes elements with any stride. Writes nothing else.
template <typename T>
TORCH_EXT_INLINE void store_elements(void* target, ScalarType type, std::int64_t stride,
                                     std::int64_t count, Vec<T> x) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (stride == 1 && count >= kLanes) return store_elements<T>(target, type, x);
  alignas(64) char gathered[kLanes * 8];
  store_elements<T>(gathered, type, x);
  const std::int64_t bytes = bytes_of(type);
  const std::int64_t wanted = min_of(count, kLanes);
  for (std::int64_t i = 0; i < wanted; ++i) {
    __builtin_memcpy(static_cast<char*>(target) + i * stride * bytes, gathered + i * bytes, bytes);
  }
}
