// The dropout mask in vectors; counter_rng.h has the scalar twin and the layout.

/// High and low words of the lane-wise 32 x 32 products.
TORCH_EXT_INLINE void multiply_wide(Uint32Vector a, std::uint32_t multiplier, Uint32Vector& high,
                                    Uint32Vector& low) {
#if defined(TORCH_EXT_HAS_AVX512)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(multiplier));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (Uint32Vector)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = (Uint32Vector)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(TORCH_EXT_HAS_AVX2)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(multiplier));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  low = (Uint32Vector)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (Uint32Vector)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    const std::uint64_t product = std::uint64_t{a[lane]} * multiplier;
    low[lane] = static_cast<std::uint32_t>(product);
    high[lane] = static_cast<std::uint32_t>(product >> 32);
  }
#endif
}

/// Philox4x32-10 on kFloatLanes counters.
TORCH_EXT_INLINE void philox_vector(Uint32Vector counter[4], std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Uint32Vector high0, low0, high1, low1;
    multiply_wide(counter[0], kPhiloxMultiplier0, high0, low0);
    multiply_wide(counter[2], kPhiloxMultiplier1, high1, low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
}

struct DropoutState {
  bool active;
  std::uint32_t threshold;
  std::uint64_t seed;
  double scale;  // of what is kept, and of the values
};

TORCH_EXT_INLINE DropoutState dropout_state(const AttentionDropout& dropout) {
  if (!(dropout.probability > 0.0)) return {false, 0u, 0u, 1.0};
  const double bits = dropout.probability * 65536.0 + 0.5;
  const std::uint32_t threshold = static_cast<std::uint32_t>(bits);
  return {true, threshold, static_cast<std::uint64_t>(*dropout.seed) + dropout.seed_offset,
          threshold >= 65536u ? 0.0 : 65536.0 / (65536.0 - threshold)};
}

/// Of a forward pass, whose values may have a factor too.
TORCH_EXT_INLINE DropoutState dropout_state(const AttentionForwardParams& params) {
  DropoutState state = dropout_state(params.dropout);
  state.scale *= params.value_scale;
  return state;
}

/// Lanes = queries: zeroes the dropped weights of 8 consecutive keys from `key`, a multiple of 8.
/// `query` and `slice` are per lane, as 32-bit words.
template <typename T>
TORCH_EXT_INLINE void drop_weights_of_queries(T* weights, std::int64_t weight_stride,
                                              std::int64_t keys, std::int64_t first_key,
                                              int vectors, const std::uint32_t* query,
                                              const std::uint32_t* slice,
                                              const DropoutState& state) {
  constexpr int kLanes = Simd<T>::kLanes;
  using IntVector = typename Simd<T>::IntVector;
  // Double has half the lanes of the generator; its upper half goes unused.
  for (int vector = 0; vector < vectors; ++vector) {
    for (std::int64_t key = 0; key < keys; key += kDropoutKeysPerCall) {
      Uint32Vector counter[4] = {};
      __builtin_memcpy(&counter[0], query + vector * kLanes, kLanes * 4);
      counter[1] =
          static_cast<std::uint32_t>((first_key + key) / kDropoutKeysPerCall) - Uint32Vector{};
      __builtin_memcpy(&counter[2], slice + vector * kLanes, kLanes * 4);
      philox_vector(counter, state.seed);
      const std::int64_t count = min_of(keys - key, kDropoutKeysPerCall);
      for (std::int64_t i = 0; i < count; ++i) {
        const Uint32Vector bits =
            counter[i / 2] >> static_cast<std::uint32_t>(16 * (i % 2)) & 0xFFFFu;
        IntVector keep;
        if constexpr (sizeof(T) == 4) {
          keep = (IntVector)(bits >= state.threshold);
        } else {
          for (int lane = 0; lane < kLanes; ++lane)
            keep[lane] = bits[lane] >= state.threshold ? -1 : 0;
        }
        T* weight = weights + (key + i) * weight_stride + vector * kLanes;
        store<T>(weight, (Vec<T>)((IntVector)load<T>(weight) & keep));
      }
    }
  }
}

/// Lanes = keys: bits[query][key] of `queries` rows from `first_query` and keys from `first_key`, a
/// multiple of 8. `bits_stride` is a multiple of 2 * kFloatLanes, and as many keys are written;
/// rows are written in multiples of kFloatLanes.
TORCH_EXT_INLINE void dropout_bits_of_keys(std::uint16_t* bits, std::int64_t bits_stride,
                                           std::int64_t queries, std::int64_t keys,
                                           std::int64_t first_query, std::int64_t first_key,
                                           std::uint32_t slice, std::uint64_t seed) {
  constexpr int kCalls = kFloatLanes / 4;  // 4 words of a call x kCalls fill a row of the block
  const Uint32Vector lanes = (Uint32Vector)lane_index<float>();
  for (std::int64_t query = 0; query < queries; query += kFloatLanes) {
    for (std::int64_t key = 0; key < keys; key += 2 * kFloatLanes) {
      Uint32Vector words[kFloatLanes];
      for (int call = 0; call < kCalls; ++call) {
        Uint32Vector* counter = words + 4 * call;
        counter[0] = lanes + static_cast<std::uint32_t>(first_query + query);
        counter[1] = static_cast<std::uint32_t>((first_key + key) / kDropoutKeysPerCall + call) -
                     Uint32Vector{};
        counter[2] = slice - Uint32Vector{};
        counter[3] = Uint32Vector{};
        philox_vector(counter, seed);
      }
      transpose<std::uint32_t>(words);
      for (int lane = 0; lane < kFloatLanes; ++lane) {
        store<std::uint32_t>(bits + (query + lane) * bits_stride + key, words[lane]);
      }
    }
  }
}

/// All ones in the lanes that dropout keeps, from kLanes 16-bit words.
template <typename T>
TORCH_EXT_INLINE typename Simd<T>::IntVector dropout_keep(const std::uint16_t* bits,
                                                          std::uint32_t threshold) {
  using IntVector = typename Simd<T>::IntVector;
  if constexpr (sizeof(T) == 4) {
    return (IntVector)(widen_uint16(bits) >= threshold);
  } else {
    IntVector keep;
    for (int lane = 0; lane < Simd<T>::kLanes; ++lane)
      keep[lane] = bits[lane] >= threshold ? -1 : 0;
    return keep;
  }
}
