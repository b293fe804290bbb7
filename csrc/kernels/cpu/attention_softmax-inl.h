// The running softmax of a tile of queries, lanes are queries (Milakov and Gimelshein, arXiv
// 1805.02867), and its weights as the second product reads them.

/// The rows of one sub-tile and their running softmax. Arrays have one entry per lane.
template <typename Policy>
struct QueryTile {
  using T = typename Policy::Compute;
  typename Policy::Scalar* panel;   // (head_dim / depth, lanes): Q^T with the scale's sign
  T* out;                           // (value_dim, lanes): O^T, not normalised
  T* reference;                     // of the weights: 2^8 below the maximum at most
  T* maximum;                       // of the scores
  T* sum;                           // of the weights before dropout
  typename Simd<T>::Int* last_key;  // the last key that causality allows
  std::uint32_t* query;             // position, for dropout
  std::uint32_t* slice;             // batch * query_heads + head, for dropout
  std::int64_t* query_offset;       // of the row in query, out and mask, in elements
  std::int64_t* out_offset;
  std::int64_t* mask_offset;
  std::int64_t count;  // rows; the other lanes compute on zeros
  int vectors;
  std::int64_t first_allowed_end;  // keys from here on are masked for some row
  std::int64_t last_allowed_end;   // ... and for all rows
  std::int64_t row_tile;           // index into the mask map
  bool started;
};

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
