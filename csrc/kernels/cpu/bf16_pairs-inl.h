// bf16 multiplied in pairs: a 32-bit lane holds two neighbours in the contracted dimension, the
// first in the lower half.

#if defined(TORCH_EXT_HAS_BF16_DOT)

/// sum + a.low * b.low + a.high * b.high in each lane, accumulated in fp32.
TORCH_EXT_INLINE FloatVector bf16_pair_dot(FloatVector sum, Uint32Vector a, Uint32Vector b) {
  return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}

/// Rounded to nearest even.
TORCH_EXT_INLINE Uint32Vector pack_bf16_pairs(FloatVector low, FloatVector high) {
  // vcvtneps2bf16 twice and a merge: vcvtne2ps2bf16 would need a lane permutation on top.
  const __m512i low_words = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
  const __m512i high_words = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
  return (Uint32Vector)_mm512_or_si512(low_words, _mm512_slli_epi32(high_words, 16));
}

/// kFloatLanes consecutive bf16 elements.
TORCH_EXT_INLINE void store_bf16(std::uint16_t* target, FloatVector x) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(target, &bits, sizeof bits);
}

#endif
