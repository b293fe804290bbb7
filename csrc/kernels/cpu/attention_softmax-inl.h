// The running softmax of a tile of queries, lanes are queries (Milakov and Gimelshein, arXiv
// 1805.02867), and its weights as the second product reads them.

/// The rows of one sub-tile and their running softmax. Arrays have one entry per lane.
template <typename Policy>
struct QueryTile {
  using T = typename Policy::Compute;
  typename Policy::Scalar* panel;    // (head_dim / depth, lanes): Q^T with the scale's sign
  T* out;                            // (value_dim, lanes): O^T, not normalised
  T* reference;                      // of the weights: 2^8 below the maximum at most
  T* maximum;                        // of the scores
  T* sum;                            // of the weights before dropout
  typename Simd<T>::Int* first_key;  // the first and the last key that the window leaves
  typename Simd<T>::Int* last_key;
  T* alibi_slope;
  T* alibi_position;
  std::uint32_t* query;        // position, for dropout
  std::uint32_t* slice;        // batch * query_heads + head, for dropout
  std::int64_t* query_offset;  // of the row in query, out and mask, in elements
  std::int64_t* out_offset;
  std::int64_t* mask_offset;
  std::int64_t count;  // rows; the other lanes compute on zeros
  int vectors;
  Range any_keys;         // of some row, by the window
  Range all_keys;         // of every row
  std::int64_t row_tile;  // index into the mask map
  bool started;
};

/// logsumexp of a row whose weights are sums of 2^((score - reference) * log2). The maximum's own
/// weight is 1, so nothing is below the maximum's natural score: rounded as the backward pass
/// rounds scores, which thus never finds a weight above 1.
template <typename T>
TORCH_EXT_INLINE T log_sum(const ScoreDomain<T>& domain, T maximum, T reference, T sum) {
  if (sum == 0) return -kInfinity<T>;
  const T highest = rounded(maximum * domain.unit);
  const T exponent = (maximum - reference) * domain.log2;
  T rest;
  if constexpr (sizeof(T) == 8) {
    rest = __builtin_log(sum) - exponent * kLn2;
  } else {
    rest = static_cast<T>(__builtin_log(static_cast<double>(sum)) - exponent * kLn2);
  }
  return highest + (rest < 0 ? static_cast<T>(0) : rest);
}

/// The factor that normalises a row's sums, and its logsumexp.
template <typename T>
struct RowTotal {
  T inverse;
  T logsumexp;
};

/// `keep_scale`: of dropout. `sink`: the row's, which joins its keys here, once whatever the
/// splits; null: it has none.
template <typename T>
TORCH_EXT_INLINE RowTotal<T> row_total(const ScoreDomain<T>& domain, T maximum, T reference, T sum,
                                       double keep_scale, const T* sink) {
  if (sink == nullptr) {
    return {sum == 0 ? static_cast<T>(0) : static_cast<T>(keep_scale) / sum,
            log_sum(domain, maximum, reference, sum)};
  }
  if (sum == 0) return {static_cast<T>(0), *sink};
  const double highest = rounded(maximum * domain.unit);
  const double largest = *sink > highest ? *sink : highest;
  // Of the keys, and of all, relative to the largest.
  const double keys_scale =
      __builtin_exp2(-static_cast<double>((maximum - reference) * domain.log2)) *
      __builtin_exp(highest - largest);
  const double total = sum * keys_scale + __builtin_exp(*sink - largest);
  const double rest = __builtin_log(total);
  return {static_cast<T>(keep_scale * keys_scale / total),
          static_cast<T>(largest) + static_cast<T>(rest < 0 ? 0.0 : rest)};
}

/// A query head's sink; null: the call has none.
template <typename T>
TORCH_EXT_INLINE const T* sink_of(const ScoreTransform& transform, std::int64_t head) {
  return transform.sink == nullptr ? nullptr : static_cast<const T*>(transform.sink) + head;
}

/// Online softmax of one tile: scores become weights. kMasked: scores may be -inf, and a row may
/// have seen none but those.
template <typename Policy, int kVectors, bool kMasked>
TORCH_EXT_INLINE void online_softmax(typename Policy::Compute* scores, std::int64_t keys,
                                     QueryTile<Policy>& tile, std::int64_t value_dim,
                                     const ScoreDomain<typename Policy::Compute>& domain) {
  using T = typename Policy::Compute;
  using IntVector = typename Simd<T>::IntVector;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kStride = kVectors * kLanes;
  Vec<T> previous[kVectors], maximum[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    previous[j] = load<T>(tile.reference + j * kLanes);
    maximum[j] = load<T>(tile.maximum + j * kLanes);
  }
  for (std::int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      maximum[j] = vector_max(maximum[j], load<T>(scores + key * kStride + j * kLanes));
    }
  }
  for (int j = 0; j < kVectors; ++j) store<T>(tile.maximum + j * kLanes, maximum[j]);
  // Rescale only when a maximum grew by more than 2^8 (FlashAttention-4's conditional rescaling):
  // weights then stay below 2^8, far from overflow.
  IntVector grew{};
  for (int j = 0; j < kVectors; ++j) grew |= maximum[j] > previous[j] + domain.growth;
  if (any_lane(grew)) {
    Vec<T> shrink[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      // A row that is masked so far: any finite reference serves, its sums are 0.
      const Vec<T> reference = maximum[j] == broadcast(-kInfinity<T>) ? Vec<T>{} : maximum[j];
      shrink[j] = exp2_product(vector_max(broadcast(domain.lowest), previous[j] - reference),
                               broadcast(domain.log2));
      store<T>(tile.sum + j * kLanes, load<T>(tile.sum + j * kLanes) * shrink[j]);
      previous[j] = maximum[j];
      store<T>(tile.reference + j * kLanes, maximum[j]);
    }
    if (tile.started) {
      for (std::int64_t d = 0; d < value_dim; ++d) {
        for (int j = 0; j < kVectors; ++j) {
          T* out = tile.out + d * kStride + j * kLanes;
          store<T>(out, load<T>(out) * shrink[j]);
        }
      }
    }
  }
  Vec<T> reference[kVectors], sum[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    sum[j] = Vec<T>{};
    reference[j] = previous[j];
    if constexpr (kMasked) {
      reference[j] = previous[j] == broadcast(-kInfinity<T>) ? Vec<T>{} : previous[j];
    }
  }
  for (std::int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* score = scores + key * kStride + j * kLanes;
      const Vec<T> x = load<T>(score) - reference[j];
      Vec<T> weight = exp2_product<Policy::kForwardExp2Degree>(
          vector_max(broadcast(domain.lowest), x), broadcast(domain.log2));
      if constexpr (kMasked) weight = x < domain.lowest ? Vec<T>{} : weight;
      sum[j] += weight;
      store<T>(score, weight);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store<T>(tile.sum + j * kLanes, load<T>(tile.sum + j * kLanes) + sum[j]);
  }
}

/// Packs neighbouring keys' weights into bf16 pairs, in place.
template <typename Policy, int kVectors>
TORCH_EXT_INLINE void pair_weights(typename Policy::Compute* scores, std::int64_t keys) {
#if defined(TORCH_EXT_HAS_BF16_DOT)
  using T = typename Policy::Compute;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kStride = kVectors * kLanes;
  for (std::int64_t key = 0; key < keys; key += 2) {
    for (int j = 0; j < kVectors; ++j) {
      const Vec<T> low = load<T>(scores + key * kStride + j * kLanes);
      const Vec<T> high =
          key + 1 < keys ? load<T>(scores + (key + 1) * kStride + j * kLanes) : Vec<T>{};
      store<std::uint32_t>(scores + key / 2 * kStride + j * kLanes, pack_bf16_pairs(low, high));
    }
  }
#else
  (void)scores;
  (void)keys;
#endif
}
