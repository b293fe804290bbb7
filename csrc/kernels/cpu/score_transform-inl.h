// From the product of query and key to the score that the softmax takes, the same bits wherever it
// is computed: blocks with queries in the lanes (forward) and rows with keys in the lanes
// (decoding, backward). A new modifier of scores is a term here. Excluded scores become -inf by
// selection, so that a NaN there does not survive.

/// Weights 2^x with x below this are 0: where exp2_product() ends.
template <typename T>
constexpr double kNegligibleExponent = sizeof(T) == 8 ? -1021.0 : -125.0;

template <typename T>
constexpr T kLargest = static_cast<T>(sizeof(T) == 8 ? 1.7976931348623157e308
                                                     : 3.4028234663852886e38);

/// The numbers that scores are kept as while weights are taken of their differences:
///   weight = 2^((score - reference) * log2).
/// The products themselves (unit = |scale|) round nothing on the way, whatever their size; natural
/// scores (unit = 1), scaled and rounded, where they are capped or something is added to them.
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

/// Key padding of keys [first, first + count) as what is added to their scores: -inf where they are
/// ignored, and from the end on to `width`.
template <typename T>
TORCH_EXT_INLINE void load_key_bias(const std::uint8_t* padding, std::int64_t stride,
                                    std::int64_t first, std::int64_t count, std::int64_t width,
                                    T* bias) {
  for (std::int64_t key = 0; key < width; ++key) {
    const bool ignored = key >= count || (padding != nullptr && padding[(first + key) * stride]);
    bias[key] = ignored ? -kInfinity<T> : static_cast<T>(0);
  }
}

/// Scale and soft cap of a call.
template <typename T>
struct ScoreFunction {
  bool natural;  // scores are natural ones, see ScoreDomain
  bool capped;
  T factor;  // of the product; what comes out is divided by the cap
  T softcap;

  /// `scale` is the transform's, or its size where the sign is in the product.
  TORCH_EXT_INLINE ScoreFunction of(const ScoreTransform& transform, double scale, bool natural) {
    const bool capped = transform.softcap > 0.0;
    return {natural, capped,
            static_cast<T>(!natural  ? 1.0
                           : !capped ? scale
                                     : scale / transform.softcap),
            static_cast<T>(transform.softcap)};
  }

  /// Whether natural scores are more than products times the scale.
  TORCH_EXT_INLINE bool is_natural(const ScoreTransform& transform) {
    return transform.mask.kind == AttentionMaskKind::kAdditive || transform.softcap > 0.0 ||
           transform.alibi.data != nullptr;
  }

  /// The score before anything is added; `slope` is its derivative, of the scaled product.
  TORCH_EXT_INLINE Vec<T> cap(const ScoreFunction& function, Vec<T> product, Vec<T>& slope) {
    const Vec<T> t = tanh_vector(rounded(product * function.factor));
    slope = vector_max(Vec<T>{}, static_cast<T>(1) - t * t);
    return rounded(t * function.softcap);
  }
  TORCH_EXT_INLINE Vec<T> scaled(const ScoreFunction& function, Vec<T> product) {
    return rounded(product * function.factor);
  }
};

/// What ALiBi makes of a score. `slope` is positive as a rule; positions of queries include the
/// offset.
template <typename T>
TORCH_EXT_INLINE Vec<T> add_alibi(Vec<T> score, Vec<T> slope, Vec<T> query, Vec<T> key) {
  return rounded(score - rounded(slope * absolute<T>(query - key)));
}

/// ALiBi's slope of a query head.
TORCH_EXT_INLINE float alibi_slope(const AlibiSlopes& alibi, const AttentionShape& shape,
                                   std::int64_t batch, std::int64_t head) {
  const BasicStridedView<const float*> view{alibi.data, alibi.batch_strides, alibi.head_stride};
  return alibi.data[slice_offset(view, shape.batch_sizes, batch, head)];
}

/// A query's position among the keys.
template <typename T>
TORCH_EXT_INLINE T alibi_position(const KeyWindow& window, std::int64_t query) {
  return static_cast<T>(extent::saturating_add(query, window.offset));
}

/// scores[key][lane] of lanes = queries, products so far, of keys from first_key on.
template <typename T>
struct ScoreColumns {
  static constexpr int kLanes = Simd<T>::kLanes;
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;

  T* scores;
  std::int64_t stride;
  int vectors;
  std::int64_t first_key;
  std::int64_t keys;

  /// Scale, cap and ALiBi, and a mask where row_of(lane), each lane's row of it, is given.
  template <bool kCapped, bool kAlibi, typename RowOf>
  TORCH_EXT_INLINE void apply(const ScoreColumns& columns, const ScoreFunction<T>& function,
                              const T* slopes, const T* positions, bool masked, ScalarType type,
                              std::int64_t col_stride, bool uniform, RowOf row_of) {
    for (int vector = 0; vector < columns.vectors; ++vector) {
      T* const column = columns.scores + vector * kLanes;
      const Vec<T> slope = kAlibi ? load<T>(slopes + vector * kLanes) : Vec<T>{};
      const Vec<T> position = kAlibi ? load<T>(positions + vector * kLanes) : Vec<T>{};
      for (std::int64_t key = 0; key < columns.keys; key += kLanes) {
        const std::int64_t count = min_of(columns.keys - key, kLanes);
        Vec<T> block[kLanes];
        if (masked && uniform) {
          // One row for all queries: a scalar per key.
          const Vec<T> row =
              load_mask<T>(row_of(0), type, col_stride, columns.first_key + key, count);
          for (int i = 0; i < kLanes; ++i) block[i] = broadcast<T>(row[i]);
        } else if (masked) {
#pragma GCC unroll 1
          for (int lane = 0; lane < kLanes; ++lane) {
            block[lane] = load_mask<T>(row_of(vector * kLanes + lane), type, col_stride,
                                       columns.first_key + key, count);
          }
          transpose<T>(block);
        }
        Vec<T> number = broadcast(static_cast<T>(columns.first_key + key));
        for (std::int64_t i = 0; i < count; ++i) {
          T* const place = column + (key + i) * columns.stride;
          Vec<T> unused;
          Vec<T> score = kCapped ? ScoreFunction<T>::cap(function, load<T>(place), unused)
                                 : ScoreFunction<T>::scaled(function, load<T>(place));
          if (masked) score = add_mask<T>(score, block[i]);
          if constexpr (kAlibi) {
            score = add_alibi<T>(score, slope, position, number);
            number += static_cast<T>(1);
          }
          store<T>(place, score);
        }
      }
    }
  }

  /// Excludes keys that padding ignores, bytes of key 0 on.
  void exclude_padding(const std::uint8_t* padding, std::int64_t col_stride) const {
    for (std::int64_t key = 0; key < keys; ++key) {
      if (!padding[(first_key + key) * col_stride]) continue;
      for (int vector = 0; vector < vectors; ++vector) {
        store<T>(scores + key * stride + vector * kLanes, broadcast(-kInfinity<T>));
      }
    }
  }

  /// Excludes keys before first[lane] (kLeft) and keys beyond last[lane].
  template <bool kLeft>
  void exclude_outside(const Int* first, const Int* last) const {
    const Vec<T> masked = broadcast(-kInfinity<T>);
    for (int vector = 0; vector < vectors; ++vector) {
      IntVector low, high;
      __builtin_memcpy(&low, first + vector * kLanes, sizeof low);
      __builtin_memcpy(&high, last + vector * kLanes, sizeof high);
      for (std::int64_t key = 0; key < keys; ++key) {
        T* const score = scores + key * stride + vector * kLanes;
        const IntVector index = static_cast<Int>(first_key + key) - IntVector{};
        IntVector outside = index > high;
        if constexpr (kLeft) outside |= index < low;
        store<T>(score, outside ? masked : load<T>(score));
      }
    }
  }
};

/// The scores of one query, keys in the lanes.
template <typename T>
struct ScoreRow {
  static constexpr int kLanes = Simd<T>::kLanes;
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;

  ScoreFunction<T> function;
  const char* mask;  // of key 0; null: none is added
  ScalarType mask_type;
  std::int64_t mask_stride;
  const T* key_bias;      // 0, or -inf where a key is excluded; null: none is
  std::int64_t bias_key;  // of key_bias[0]
  bool alibi;
  T slope;
  T position;
  bool bounded;  // by the window, here
  Range window;

  /// Without what is a matter of the keys: key_bias, bounded. The mask is added.
  TORCH_EXT_INLINE ScoreRow of(const ScoreFunction<T>& function, const ScoreTransform& transform,
                               const AttentionShape& shape, std::int64_t batch, std::int64_t head,
                               std::int64_t query) {
    ScoreRow row{};
    row.function = function;
    const AttentionMask& mask = transform.mask;
    if (mask.kind != AttentionMaskKind::kNone) {
      row.mask_type = mask.kind == AttentionMaskKind::kAdditive ? mask.dtype : ScalarType::kBool;
      row.mask = element_at(
          mask.view.data, row.mask_type,
          slice_offset(mask.view, shape.batch_sizes, batch, head) + query * mask.view.row_stride);
      row.mask_stride = mask.view.col_stride;
    }
    if (transform.alibi.data != nullptr) {
      row.alibi = true;
      row.slope = alibi_slope(transform.alibi, shape, batch, head);
      row.position = alibi_position<T>(transform.window, query);
    }
    row.window = keys_of(transform.window, query, shape.kv_len);
    return row;
  }

  /// The same of the query `i` rows further down.
  TORCH_EXT_INLINE ScoreRow below(ScoreRow row, const ScoreTransform& transform,
                                  const AttentionShape& shape, std::int64_t query, std::int64_t i) {
    if (row.mask != nullptr) {
      row.mask = element_at(row.mask, row.mask_type, i * transform.mask.view.row_stride);
    }
    if (row.alibi) row.position = alibi_position<T>(transform.window, query + i);
    if (row.bounded) row.window = keys_of(transform.window, query + i, shape.kv_len);
    return row;
  }

  /// Of `key` and the keys that follow, `count` of which the mask has. kModified: there is more
  /// than the scale. `cap_slope` is 1 without a cap.
  template <bool kModified>
  TORCH_EXT_INLINE Vec<T> apply(const ScoreRow& row, Vec<T> product, std::int64_t key,
                                std::int64_t count, Vec<T>& cap_slope) {
    if constexpr (!kModified) return ScoreFunction<T>::scaled(row.function, product);
    Vec<T> score = row.function.capped ? ScoreFunction<T>::cap(row.function, product, cap_slope)
                                       : ScoreFunction<T>::scaled(row.function, product);
    if (row.mask != nullptr) {
      score =
          add_mask<T>(score, load_mask<T>(row.mask, row.mask_type, row.mask_stride, key, count));
    }
    if (row.alibi) {
      const Vec<T> keys = static_cast<T>(key) + lane_numbers<T>();
      score = add_alibi<T>(score, broadcast(row.slope), broadcast(row.position), keys);
    }
    if (row.key_bias != nullptr) {
      const Vec<T> bias = load<T>(row.key_bias + key - row.bias_key);
      score = bias == Vec<T>{} ? score : bias;
    }
    if (row.bounded) {
      const auto lane_of = [key](std::int64_t k) {
        return static_cast<Int>(max_of(min_of(k - key, kLanes), 0));
      };
      const IntVector lane = lane_index<T>();
      const IntVector outside =
          (lane < lane_of(row.window.begin)) | (lane >= lane_of(row.window.end));
      score = outside ? broadcast(-kInfinity<T>) : score;
    }
    return score;
  }
};
