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
  T* grad_score;                   // (queries, keys) dP, then dS of the scaled products
  T* mask_score;                   // (queries, keys) dS of what a mask adds to
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
  std::int64_t key_offset;                   // of first_key in the tile
  ScoreRow<typename Policy::Compute> score;  // of first_query
  bool modified;                             // scores are more than products times the scale
  std::uint32_t slice;                       // batch * query_heads + head, for dropout
  typename Policy::Compute* mask_sum;  // where the mask's gradient of (first_query, key 0) goes

  /// The scores of query `i` of the block.
  ScoreRow<typename Policy::Compute> row(const AttentionBackwardParams& params,
                                         std::int64_t i) const {
    return ScoreRow<typename Policy::Compute>::below(score, params.transform, params.shape,
                                                     first_query, i);
  }
};

template <typename Policy>
struct ScoreGradient {
  using T = typename Policy::Compute;
  using IntVector = typename Simd<T>::IntVector;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  const DropoutState& dropout;

  /// Products and dP become what the remaining products read: P after dropout, dS.
  template <bool kModified, bool kDropout>
  void weigh(const BackwardScratch<Policy>& scratch, const ScoreBlock<Policy>& block) const {
    const std::int64_t stride = plan.key_tile;
    const ScoreDomain<T> natural = ScoreDomain<T>::of(1.0);
    for (std::int64_t row = 0; row < block.queries; row += Policy::kDepth) {
      ScoreRow<T> scores[Policy::kDepth];
      for (int t = 0; t < Policy::kDepth; ++t) {
        scores[t] = kModified ? block.row(params, row + t) : block.score;
      }
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
          Vec<T> cap_slope;
          const Vec<T> score = ScoreRow<T>::template apply<kModified>(
              scores[t], load<T>(scratch.weight + place), block.first_key + j * kLanes,
              max_of(block.keys - j * kLanes, 0), cap_slope);
          const Vec<T> x = vector_min(Vec<T>{}, score - scratch.reference[head_row]);
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
          if constexpr (kModified) {
            const IntVector negligible = x < natural.lowest;
            w = negligible ? Vec<T>{} : w;
            ds = negligible ? Vec<T>{} : ds;
          }
          if constexpr (kDropout) w = (Vec<T>)((IntVector)w & kept);
          // The mask's gradient reads it in full precision, and before the cap.
          if (block.mask_sum != nullptr) store<T>(scratch.mask_score + place, ds);
          if constexpr (kModified) {
            if (scores[t].function.capped) ds *= cap_slope;
          }
          weight[t] = w;
          grad_score[t] = ds;
          if constexpr (Policy::kDepth == 1) {
            store<T>(scratch.weight + place, w);
            store<T>(scratch.grad_score + place, ds);
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
