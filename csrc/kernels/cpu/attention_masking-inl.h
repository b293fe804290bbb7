// Score modifiers of one tile: causal, boolean and additive masks, key padding. Scores are in the
// log2 domain. Masked scores become -inf by selection, so that a NaN there does not survive.

/// Weights 2^x with x below this are 0: where exp2_vector() ends.
template <typename T>
constexpr double kNegligibleExponent = sizeof(T) == 8 ? -1021.0 : -125.0;

/// Key padding of keys [first, first + count).
TORCH_EXT_INLINE TileClass classify_key_padding(const std::uint8_t* padding, std::int64_t stride,
                                                std::int64_t first, std::int64_t count) {
  std::uint8_t any_ignored = 0;
  std::uint8_t any_kept = 0;
  for (std::int64_t key = first; key < first + count; ++key) {
    any_ignored |= padding[key * stride];
    any_kept |= padding[key * stride] == 0;
  }
  if (!any_ignored) return TileClass::kFull;
  return any_kept ? TileClass::kMixed : TileClass::kEmpty;
}

/// What the mask adds for `count` <= kLanes consecutive keys of one query, in the natural domain.
template <typename T>
TORCH_EXT_INLINE Vec<T> load_mask(const void* row, ScalarType type, std::int64_t col_stride,
                                  std::int64_t key, std::int64_t count) {
  return load_elements<T>(element_at(row, type, key * col_stride), type, col_stride, count);
}

/// Finite masks do not go below this: the lowest value of the dtype, with which rows are masked by
/// those who want uniform weights where nothing is left, must not become -inf in the log2 domain.
template <typename T>
constexpr T kLowestMask = static_cast<T>(sizeof(T) == 8 ? -1.24e308 : -2.358e38);

template <typename T>
TORCH_EXT_INLINE Vec<T> add_mask(Vec<T> score, Vec<T> mask) {
  const Vec<T> masked = broadcast(-kInfinity<T>);
  const Vec<T> added =
      score + vector_max(broadcast(kLowestMask<T>), mask) * static_cast<T>(kLog2eDouble);
  return mask == masked ? masked : added;
}

/// scores[key][lane] of lanes = queries += mask; row_of(lane) gives each lane's row of the mask.
template <typename T, typename RowOf>
TORCH_EXT_INLINE void add_mask_transposed(T* scores, std::int64_t score_stride, std::int64_t keys,
                                          int vectors, std::int64_t first_key, ScalarType type,
                                          std::int64_t col_stride, bool uniform, RowOf row_of) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int vector = 0; vector < vectors; ++vector) {
    T* column = scores + vector * kLanes;
    for (std::int64_t key = 0; key < keys; key += kLanes) {
      const std::int64_t count = min_of(keys - key, kLanes);
      Vec<T> block[kLanes];
      if (uniform) {
        // One row for all queries: a scalar per key.
        const Vec<T> row = load_mask<T>(row_of(0), type, col_stride, first_key + key, count);
        for (int i = 0; i < kLanes; ++i) block[i] = broadcast<T>(row[i]);
      } else {
#pragma GCC unroll 1
        for (int lane = 0; lane < kLanes; ++lane) {
          block[lane] = load_mask<T>(row_of(vector * kLanes + lane), type, col_stride,
                                     first_key + key, count);
        }
        transpose<T>(block);
      }
      for (std::int64_t i = 0; i < count; ++i) {
        T* score = column + (key + i) * score_stride;
        store<T>(score, add_mask<T>(load<T>(score), block[i]));
      }
    }
  }
}

/// Masks every score whose key lies beyond last_key[lane].
template <typename T>
TORCH_EXT_INLINE void mask_after(T* scores, std::int64_t score_stride, std::int64_t keys,
                                 int vectors, std::int64_t first_key,
                                 const typename Simd<T>::Int* last_key) {
  using IntVector = typename Simd<T>::IntVector;
  constexpr int kLanes = Simd<T>::kLanes;
  const Vec<T> masked = broadcast(-kInfinity<T>);
  for (int vector = 0; vector < vectors; ++vector) {
    IntVector last;
    __builtin_memcpy(&last, last_key + vector * kLanes, sizeof last);
    for (std::int64_t key = 0; key < keys; ++key) {
      T* score = scores + key * score_stride + vector * kLanes;
      const IntVector index = static_cast<typename Simd<T>::Int>(first_key + key) - IntVector{};
      store<T>(score, index > last ? masked : load<T>(score));
    }
  }
}
