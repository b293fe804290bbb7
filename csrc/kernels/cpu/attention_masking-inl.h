// Score modifiers of one tile: causal, boolean and additive masks, key padding. Masked scores
// become -inf by selection, so that a NaN there does not survive.

/// Weights 2^x with x below this are 0: where exp2_product() ends.
template <typename T>
constexpr double kNegligibleExponent = sizeof(T) == 8 ? -1021.0 : -125.0;

template <typename T>
constexpr T kLargest = static_cast<T>(sizeof(T) == 8 ? 1.7976931348623157e308
                                                     : 3.4028234663852886e38);

/// The numbers that scores are kept as while weights are taken of their differences:
///   weight = 2^((score - reference) * log2).
/// The products themselves (unit = |scale|) round nothing on the way, whatever their size; natural
/// scores (unit = 1), scaled and rounded, where an additive mask comes on top.
template <typename T>
struct ScoreDomain {
  T unit;    // natural score / score
  T log2;    // unit * log2(e)
  T lowest;  // of a difference that has a weight
  T growth;  // of a maximum for which sums are rescaled: weights stay below 2^8

  TORCH_EXT_INLINE ScoreDomain of(double unit) {
    // Scales of no use may leave the type's range; no infinity, for 0 * infinity.
    const auto finite = [](double x) {
      return static_cast<T>(x > kLargest<T> ? kLargest<T> : x < -kLargest<T> ? -kLargest<T> : x);
    };
    const T log2 = finite(unit * kLog2eDouble);
    return {finite(unit), log2, finite(kNegligibleExponent<T> / log2), finite(8.0 / log2)};
  }
};

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

/// A finite mask does not make -inf of a score: the lowest value of the dtype masks rows for those
/// who want uniform weights where nothing is left.
template <typename T>
TORCH_EXT_INLINE Vec<T> add_mask(Vec<T> score, Vec<T> mask) {
  const Vec<T> masked = broadcast(-kInfinity<T>);
  const Vec<T> added = vector_max(broadcast(-kLargest<T>), score + mask);
  return mask == masked ? masked : added;
}

/// scores[key][lane] of lanes = queries become score * factor + mask; row_of(lane) gives each
/// lane's row of the mask.
template <typename T, typename RowOf>
TORCH_EXT_INLINE void add_mask_transposed(T* scores, std::int64_t score_stride, std::int64_t keys,
                                          int vectors, std::int64_t first_key, ScalarType type,
                                          std::int64_t col_stride, bool uniform, T factor,
                                          RowOf row_of) {
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
        store<T>(score, add_mask<T>(rounded(load<T>(score) * factor), block[i]));
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
