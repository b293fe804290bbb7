// From the scores and dP of a block to the weights and dS, as the remaining products of the
// backward pass read them. Lanes are keys.

/// The private memory of a worker. Row stride of everything with keys in its columns:
/// plan.key_tile.
template <typename Policy>
struct BackwardScratch {
  using T = typename Policy::Compute;
  using Scalar = typename Policy::Scalar;
  Scalar* key_panel;               // (head_dim / depth, keys) K^T
  Scalar* value_panel;             // (value_dim / depth, keys) V^T
  char* key_rows;                  // (keys, head_dim) staged K
  T* grad_key;                     // (head_dim, keys) dK^T
  T* grad_value;                   // (value_dim, keys) dV^T
  T* weight;                       // (queries, keys) S, then P after dropout
  T* grad_score;                   // (queries, keys) dP, then dS
  Scalar* weight_pairs;            // (queries / 2, keys), for bf16 pairs
  Scalar* grad_score_pairs;        // (queries / 2, keys)
  std::uint16_t* grad_score_rows;  // (queries, keys) bf16
  char* query_rows;                // (queries, head_dim) staged Q
  char* grad_out_rows;             // (queries, value_dim) staged dO
  std::uint16_t* dropout_bits;     // (queries, keys)
  T* key_bias;                     // (keys) 0, or -inf where padding or the end excludes the key
  T* row_lanes;                    // (queries, 2, lanes)
  T* reference;   // (group, q_len) of the weights; +inf for rows that attend to nothing
  T* factor;      // (group, q_len) weight = factor * exp(score - reference)
  T* delta;       // (group, q_len)
  T* grad_query;  // (group, q_len, head_stride) dQ
};

/// Some queries of one head against some keys of the tile.
template <typename Policy>
struct ScoreBlock {
  std::int64_t head;  // within the group
  std::int64_t first_query;
  std::int64_t queries;
  std::int64_t first_key;
  std::int64_t keys;  // that any of the queries may attend to
  std::int64_t vectors;
  const char* mask_row;  // of first_query, key 0
  std::uint32_t slice;   // batch * query_heads + head, for dropout
  bool adds_mask;
  bool adds_key_bias;
  bool diagonal;
  typename Policy::Compute* mask_sum;  // where the mask's gradient of (first_query, key 0) goes
};

/// The inputs of a block's natural scores; the products lie in scratch.weight.
template <typename Policy>
struct NaturalScores {
  const ScoreTransform& transform;
  const BackwardScratch<Policy>& scratch;
  const ScoreBlock<Policy>& block;
  typename Policy::Compute scale;
};

/// Natural scores of the block's query `i` and kLanes keys from `key` on, whose products lie at
/// `place`. Rounded step by step as the forward pass does it: the same bits.
template <bool kMasked, typename Policy>
TORCH_EXT_INLINE Vec<typename Policy::Compute> natural_scores(const NaturalScores<Policy>& scores,
                                                              std::int64_t i, std::int64_t key,
                                                              std::int64_t place) {
  using T = typename Policy::Compute;
  using Int = typename Simd<T>::Int;
  constexpr int kLanes = Simd<T>::kLanes;
  const ScoreTransform& transform = scores.transform;
  const ScoreBlock<Policy>& block = scores.block;
  Vec<T> score = rounded(load<T>(scores.scratch.weight + place) * scores.scale);
  if constexpr (kMasked) {
    if (block.adds_mask) {
      const ScalarType type = transform.mask.kind == AttentionMaskKind::kAdditive
                                  ? transform.mask.dtype
                                  : ScalarType::kBool;
      score = add_mask<T>(
          score, load_mask<T>(element_at(block.mask_row, type, i * transform.mask.view.row_stride),
                              type, transform.mask.view.col_stride, block.first_key + key,
                              max_of(block.keys - key, 0)));
    }
    if (block.adds_key_bias) score = add_mask<T>(score, load<T>(scores.scratch.key_bias + key));
    if (block.diagonal) {
      const std::int64_t end = keys_of(transform.window, block.first_query + i, kUnbounded).end;
      const Int last =
          static_cast<Int>(max_of(min_of(end - 1 - block.first_key - key, kLanes), -1));
      score = lane_index<T>() > last ? broadcast(-kInfinity<T>) : score;
    }
  }
  return score;
}

template <typename Policy>
struct ScoreGradient {
  using T = typename Policy::Compute;
  using IntVector = typename Simd<T>::IntVector;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  const DropoutState& dropout;

  /// Scores and dP become what the remaining products read: P after dropout, dS.
  template <bool kMasked, bool kDropout>
  void weigh(const BackwardScratch<Policy>& scratch, const ScoreBlock<Policy>& block) const {
    const std::int64_t stride = plan.key_tile;
    const NaturalScores<Policy> scores{params.transform, scratch, block,
                                       static_cast<T>(params.transform.scale)};
    const ScoreDomain<T> natural = ScoreDomain<T>::of(1.0);
    for (std::int64_t row = 0; row < block.queries; row += Policy::kDepth) {
      for (std::int64_t j = 0; j < block.vectors; ++j) {
        Vec<T> weight[Policy::kDepth];
        Vec<T> grad_score[Policy::kDepth];
        for (int t = 0; t < Policy::kDepth; ++t) {
          const std::int64_t i = row + t;
          if (Policy::kDepth > 1 && i >= block.queries) {
            weight[t] = grad_score[t] = Vec<T>{};
            continue;
          }
          const std::int64_t query = block.first_query + i;
          const std::int64_t place = i * stride + j * kLanes;
          const std::int64_t head_row = block.head * params.shape.q_len + query;
          const T delta = scratch.delta[head_row];
          // At most 0 where logsumexp is the forward pass's own. The bound comes first: a NaN
          // stays.
          const Vec<T> x =
              vector_min(Vec<T>{}, natural_scores<kMasked>(scores, i, j * kLanes, place) -
                                       scratch.reference[head_row]);
          Vec<T> w =
              exp2_product(vector_max(broadcast(natural.lowest), x), broadcast(natural.log2)) *
              scratch.factor[head_row];
          Vec<T> grad_weight = load<T>(scratch.grad_score + place);
          IntVector kept;
          if constexpr (kDropout) {
            kept = dropout_keep<T>(scratch.dropout_bits + place, dropout.threshold);
            grad_weight *= static_cast<T>(dropout.scale);
            grad_weight = (Vec<T>)((IntVector)grad_weight & kept);
          }
          Vec<T> ds = w * (grad_weight - delta);
          if constexpr (kMasked) {
            const IntVector negligible = x < natural.lowest;
            w = negligible ? Vec<T>{} : w;
            ds = negligible ? Vec<T>{} : ds;
          }
          if constexpr (kDropout) w = (Vec<T>)((IntVector)w & kept);
          weight[t] = w;
          grad_score[t] = ds;
          if constexpr (Policy::kDepth == 1) {
            store<T>(scratch.weight + place, w);
            store<T>(scratch.grad_score + place, ds);
          } else {
            // The mask's gradient reads it in full precision.
            if (block.mask_sum != nullptr) store<T>(scratch.grad_score + place, ds);
          }
        }
        if constexpr (Policy::kDepth == 2) {
          store_pairs(scratch, row, j, weight, grad_score);
        }
      }
    }
  }

  /// bf16 pairs of two queries' results, and dS as rows.
  void store_pairs(const BackwardScratch<Policy>& scratch, std::int64_t row, std::int64_t j,
                   const Vec<T>* weight, const Vec<T>* grad_score) const {
#if defined(TORCH_EXT_HAS_BF16_DOT)
    const std::int64_t pair = row / 2 * plan.key_tile + j * kLanes;
    store<std::uint32_t>(scratch.weight_pairs + pair, pack_bf16_pairs(weight[0], weight[1]));
    store<std::uint32_t>(scratch.grad_score_pairs + pair,
                         pack_bf16_pairs(grad_score[0], grad_score[1]));
    for (int t = 0; t < 2; ++t) {
      store_bf16(scratch.grad_score_rows + (row + t) * plan.key_tile + j * kLanes, grad_score[t]);
    }
#else
    (void)scratch, (void)row, (void)j, (void)weight, (void)grad_score;
#endif
  }
};
