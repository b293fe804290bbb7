// AVX-512 intrinsics on machines without AVX-512, so that the kernels written with them can be
// tested anywhere: SIMDe's where it is installed (TORCH_EXT_HAS_SIMDE), ours for what it lacks and
// for what would be too slow. To be included inside a `#pragma GCC target` region with AVX2, FMA
// and F16C, after the standard headers.
#pragma once

#include <immintrin.h>

#if defined(TORCH_EXT_HAS_SIMDE)
#define SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512BW_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512DQ_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512VL_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// Not by SIMDE_ENABLE_NATIVE_ALIASES: its typedefs of these names clash with the compiler's.
#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512d simde__m512d
#endif

namespace torch_ext::emulation {

typedef float Float16 __attribute__((vector_size(64), may_alias));
typedef std::uint32_t Word16 __attribute__((vector_size(64), may_alias));
typedef std::int64_t Int8 __attribute__((vector_size(64), may_alias));
typedef double Double8 __attribute__((vector_size(64), may_alias));
typedef std::uint16_t Short16 __attribute__((vector_size(32), may_alias));

/// A register of pairs of bf16, as the compiler's __m512bh and __m256bh are.
typedef Word16 BfloatPairs;
typedef Short16 Bfloats;

static inline __attribute__((always_inline)) Float16 fused_multiply_add(Float16 a, Float16 b,
                                                                        Float16 c) {
  struct Halves {
    __m256 half[2];
  };
  Halves x, y, z;
  __builtin_memcpy(&x, &a, sizeof a);
  __builtin_memcpy(&y, &b, sizeof b);
  __builtin_memcpy(&z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  __builtin_memcpy(&c, &z, sizeof c);
  return c;
}

/// vdpbf16ps: the upper elements first, each product rounded into the sum, subnormals as zeros.
static inline __attribute__((always_inline)) Float16 dot_bf16_pairs(Float16 sum, Word16 a,
                                                                    Word16 b) {
  sum = fused_multiply_add((Float16)(a & 0xFFFF0000u), (Float16)(b & 0xFFFF0000u), sum);
  return fused_multiply_add((Float16)(a << 16), (Float16)(b << 16), sum);
}

/// vcvtneps2bf16: to nearest even, NaN quieted.
static inline __attribute__((always_inline)) Short16 round_to_bf16(Float16 x) {
  const Word16 bits = (Word16)x;
  const Word16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Word16 chosen = (x == x) ? rounded : (bits >> 16 | 0x40u);
  return __builtin_convertvector(chosen, Short16);
}

static inline __attribute__((always_inline)) Word16 widen_words(Short16 x) {
  return __builtin_convertvector(x, Word16);
}

static inline __attribute__((always_inline)) __m256i narrow_words(Word16 x) {
  return (__m256i) __builtin_convertvector(x, Short16);
}

/// Sixteen signed bytes as words.
static inline __attribute__((always_inline)) Word16 widen_bytes(__m128i x) {
  typedef std::int8_t Byte16 __attribute__((vector_size(16), may_alias));
  typedef std::int32_t Signed16 __attribute__((vector_size(64), may_alias));
  return (Word16) __builtin_convertvector((Byte16)x, Signed16);
}

static inline __attribute__((always_inline)) Float16 words_to_float(Word16 x) {
  typedef std::int32_t Signed16 __attribute__((vector_size(64), may_alias));
  return __builtin_convertvector((Signed16)x, Float16);
}

static inline __attribute__((always_inline)) Float16 widen_fp16(__m256i bits) {
  struct Halves {
    __m256 half[2];
  } wide{{_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))}};
  Float16 result;
  __builtin_memcpy(&result, &wide, sizeof result);
  return result;
}

static inline __attribute__((always_inline)) __m256i round_to_fp16(Float16 x) {
  struct Halves {
    __m256 half[2];
  } wide;
  __builtin_memcpy(&wide, &x, sizeof x);
  return _mm256_set_m128i(_mm256_cvtps_ph(wide.half[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(wide.half[0], _MM_FROUND_TO_NEAREST_INT));
}

static inline __attribute__((always_inline)) Double8 widen_floats(__m256 x) {
  struct Halves {
    __m256d half[2];
  } wide{
      {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
  Double8 result;
  __builtin_memcpy(&result, &wide, sizeof result);
  return result;
}

static inline __attribute__((always_inline)) __m256 narrow_doubles(Double8 x) {
  struct Halves {
    __m256d half[2];
  } wide;
  __builtin_memcpy(&wide, &x, sizeof x);
  return _mm256_set_m128(_mm256_cvtpd_ps(wide.half[1]), _mm256_cvtpd_ps(wide.half[0]));
}

/// As the instruction, it faults where the address is not aligned to 64 bytes.
static inline __attribute__((always_inline)) void store_streaming(void* target, Float16 x) {
  if (reinterpret_cast<std::uintptr_t>(target) % 64 != 0) __builtin_trap();
  __builtin_memcpy(target, &x, sizeof x);
}

/// __builtin_shuffle: the compiler has no 64-byte permutation to use and would write each lane's
/// move out, in every transpose of the kernels, for minutes of compiling.
template <typename Vector, typename Mask>
static __attribute__((noinline)) Vector shuffle(Vector a, Vector b, Mask mask) {
  constexpr int kLanes = sizeof(Vector) / sizeof(a[0]);
  Vector both[2] = {a, b};
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int index = static_cast<int>(mask[lane]);
    result[lane] = both[index / kLanes][index % kLanes];
  }
  return result;
}

}  // namespace torch_ext::emulation

#define __builtin_shuffle(...) ::torch_ext::emulation::shuffle(__VA_ARGS__)

#define __m512bh ::torch_ext::emulation::BfloatPairs
#define __m256bh ::torch_ext::emulation::Bfloats

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b)                                                       \
  ((__m512)::torch_ext::emulation::dot_bf16_pairs((::torch_ext::emulation::Float16)(sum), \
                                                  (::torch_ext::emulation::Word16)(a),    \
                                                  (::torch_ext::emulation::Word16)(b)))
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(x) \
  ::torch_ext::emulation::round_to_bf16((::torch_ext::emulation::Float16)(x))
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(x) ((__m512i)::torch_ext::emulation::widen_bytes(x))
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(x) \
  ((__m512)::torch_ext::emulation::words_to_float((::torch_ext::emulation::Word16)(x)))
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(x) \
  ((__m512i)::torch_ext::emulation::widen_words((::torch_ext::emulation::Short16)(x)))
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(x) \
  ::torch_ext::emulation::narrow_words((::torch_ext::emulation::Word16)(x))
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(bits) ((__m512)::torch_ext::emulation::widen_fp16(bits))
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) \
  ::torch_ext::emulation::round_to_fp16((::torch_ext::emulation::Float16)(x))
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd(x) ((__m512d)::torch_ext::emulation::widen_floats(x))
#undef _mm512_cvtpd_ps
#define _mm512_cvtpd_ps(x) \
  ::torch_ext::emulation::narrow_doubles((::torch_ext::emulation::Double8)(x))
#undef _mm512_stream_ps
#define _mm512_stream_ps(target, x) \
  ::torch_ext::emulation::store_streaming(target, (::torch_ext::emulation::Float16)(x))

#if !defined(TORCH_EXT_HAS_SIMDE)
// What the bf16 pairs need besides; all else takes the kernels' generic branches.
#define _mm512_or_si512(a, b) \
  ((__m512i)((::torch_ext::emulation::Word16)(a) | (::torch_ext::emulation::Word16)(b)))
#define _mm512_slli_epi32(a, count) \
  ((__m512i)((::torch_ext::emulation::Word16)(a) << static_cast<std::uint32_t>(count)))
#endif
