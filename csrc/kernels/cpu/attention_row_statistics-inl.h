// What a row's weights are relative to: weight = factor * exp(score - reference). As a rule
// reference is logsumexp and factor 1. A float rounds a large logsumexp by more than weights can
// bear: by 6e-5 of them at 1024, and by the whole logarithm of the number of keys in a row whose
// every key carries a huge finite mask. Such rows take their maximum and sum from the scores once
// more, before the backward pass proper; calls that have none pay for one look at logsumexp.

template <typename Policy>
struct RowStatistics {
  using T = typename Policy::Compute;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  const ScoreBlocks<Policy>& blocks;
  char* workspace;

  /// A logsumexp beyond this is not taken at its word.
  static constexpr T kLimit = 1024;

  std::int64_t rows() const {
    return params.shape.batch() * params.shape.query_heads * params.shape.q_len;
  }
  /// Of a row, (batch, query_heads, q_len), and those that follow.
  T* references(std::int64_t row) const {
    return reinterpret_cast<T*>(workspace + plan.statistics_offset) + row;
  }
  T* factors(std::int64_t row) const { return references(rows()) + row; }

  /// -inf: the row attends to nothing.
  TORCH_EXT_INLINE bool uncertain(T logsumexp) {
    return (logsumexp > kLimit || logsumexp < -kLimit) && logsumexp > -kInfinity<T>;
  }
  /// Whether any of some queries of a slice, which counts (batch, query_heads), is uncertain.
  bool any_uncertain(std::int64_t slice, std::int64_t first, std::int64_t count) const {
    const T* logsumexp =
        static_cast<const T*>(params.logsumexp) + logsumexp_row(params, slice, first);
    bool any = false;
    for (std::int64_t row = 0; row < count; ++row) any |= uncertain(logsumexp[row]);
    return any;
  }
  bool any_uncertain() const {
    const AttentionShape& shape = params.shape;
    bool any = false;
    for (std::int64_t slice = 0; slice < shape.batch() * shape.query_heads; ++slice) {
      any |= any_uncertain(slice, 0, shape.q_len);
    }
    return any;
  }

  /// Some logsumexp is too large to be taken at its word.
  bool any = !params.logsumexp_is_small && any_uncertain();

  /// weight = factor * exp(score - reference) of a query; `slice` counts (batch, query_heads).
  struct RowWeight {
    T reference;
    T factor;
  };
  RowWeight weight_of(std::int64_t slice, std::int64_t query) const {
    if (any) {
      const std::int64_t row = slice * params.shape.q_len + query;
      return {*references(row), *factors(row)};
    }
    const std::int64_t row = logsumexp_row(params, slice, query);
    return {reference_of(static_cast<const T*>(params.logsumexp)[row]), static_cast<T>(1)};
  }

  /// A row's delta of its rowsum(grad_out * out).
  T without_grad_logsumexp(T dot, std::int64_t slice, std::int64_t query) const {
    const std::int64_t row = logsumexp_row(params, slice, query);
    const T* const grad = static_cast<const T*>(params.grad_logsumexp);
    const bool attends = static_cast<const T*>(params.logsumexp)[row] != -kInfinity<T>;
    return grad != nullptr && attends ? dot - grad[row] : dot;
  }

  static T reference_of(T logsumexp) {
    return logsumexp == -kInfinity<T> ? kInfinity<T> : logsumexp;
  }

  /// Statistics of one query block of one head. `slice` counts (batch, query_heads).
  void run(const BackwardScratch<Policy>& scratch, std::int64_t slice, std::int64_t start) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t count = min_of(plan.query_block, shape.q_len - start);
    const std::int64_t first_row = slice * shape.q_len + start;
    const T* logsumexp =
        static_cast<const T*>(params.logsumexp) + logsumexp_row(params, slice, start);
    for (std::int64_t i = 0; i < count; ++i) {
      references(first_row)[i] = reference_of(logsumexp[i]);
      factors(first_row)[i] = static_cast<T>(1);
    }
    if (!any_uncertain(slice, start, count)) return;
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    for (std::int64_t i = 0; i < count; ++i) {
      store<T>(lanes_of(scratch, i, 0), broadcast(-kInfinity<T>));
      store<T>(lanes_of(scratch, i, 1), Vec<T>{});
    }
    double key_square = 0.0;  // the largest squared norm
    for_key_tiles(scratch, batch, head, start, [&](const ScoreBlock<Policy>& block) {
      const double square = largest_square(block, batch, head / shape.group());
      key_square = square > key_square ? square : key_square;
      add_weights(scratch, block, start);
    });
    const std::int64_t query = slice_offset(params.query, shape.batch_sizes, batch, head);
    for (std::int64_t i = 0; i < count; ++i) {
      if (!uncertain(logsumexp[i])) continue;
      const double square = square_of(params.query, query + (start + i) * params.query.row_stride);
      finish_row(scratch, i, logsumexp[i], square * key_square, first_row + i);
    }
  }

 private:
  // (queries, 2, kLanes): running maxima and sums.
  T* lanes_of(const BackwardScratch<Policy>& scratch, std::int64_t i, int which) const {
    return scratch.row_lanes + (2 * i + which) * kLanes;
  }

  /// body(block), with its products in scratch.weight, of every tile of keys that some of the
  /// queries see.
  template <typename Body>
  void for_key_tiles(const BackwardScratch<Policy>& scratch, std::int64_t batch, std::int64_t head,
                     std::int64_t start, const Body& body) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t kv_head = head / shape.group();
    const Range queries{start, min_of(start + plan.query_block, shape.q_len)};
    const Range seen = keys_of_any(params.transform.window, queries, shape.kv_len);
    for (std::int64_t first = seen.begin / plan.key_tile * plan.key_tile; first < seen.end;
         first += plan.key_tile) {
      const std::int64_t keys = min_of(plan.key_tile, shape.kv_len - first);
      const TileClass padding = blocks.load_tile_bias(scratch.key_bias, batch, first, keys);
      ScoreBlock<Policy> block{};
      if (padding == TileClass::kEmpty ||
          !blocks.locate(block, batch, kv_head, head % shape.group(), start, first, keys, padding,
                         scratch.key_bias)) {
        continue;
      }
      const std::int64_t base = slice_offset(params.key, shape.batch_sizes, batch, kv_head) +
                                first * params.key.row_stride;
      blocks.pack_tile(params.key, base, shape.head_dim, keys, scratch.key_panel);
      const StagedRows<Policy> query = blocks.stage(params.query, batch, kv_head, block,
                                                    shape.head_dim, scratch.query_rows, false);
      blocks.multiply(params.query, query, params.key, shape.head_dim, scratch.key_panel, batch,
                      kv_head, block, scratch.weight);
      body(block);
    }
  }

  void add_weights(const BackwardScratch<Policy>& scratch, const ScoreBlock<Policy>& block,
                   std::int64_t start) const {
    for (std::int64_t i = 0; i < block.queries; ++i) {
      const ScoreRow<T> scores = block.row(params, i);
      T* maxima = lanes_of(scratch, block.first_query - start + i, 0);
      T* sums = lanes_of(scratch, block.first_query - start + i, 1);
      for (std::int64_t j = 0; j < block.vectors; ++j) {
        Vec<T> unused;
        const Vec<T> score = ScoreRow<T>::template apply<true>(
            scores, load<T>(scratch.weight + i * plan.key_tile + j * kLanes),
            block.first_key + j * kLanes, max_of(block.keys - j * kLanes, 0), unused);
        const Vec<T> previous = load<T>(maxima);
        const Vec<T> maximum = vector_max(previous, score);
        const Vec<T> reference = maximum == broadcast(-kInfinity<T>) ? Vec<T>{} : maximum;
        store<T>(sums, load<T>(sums) * weights(previous - reference) + weights(score - reference));
        store<T>(maxima, maximum);
      }
    }
  }

  static Vec<T> weights(Vec<T> x) {
    const ScoreDomain<T> natural = ScoreDomain<T>::of(1.0);
    const Vec<T> weight =
        exp2_product(vector_max(broadcast(natural.lowest), x), broadcast(natural.log2));
    return x < natural.lowest ? Vec<T>{} : weight;
  }

  double square_of(const ConstStridedView& view, std::int64_t offset) const {
    Vec<T> sum{};
    for (std::int64_t d = 0; d < params.shape.head_dim; d += kLanes) {
      const Vec<T> x =
          load_elements<T>(element_at(view.data, params.dtype, offset + d * view.col_stride),
                           params.dtype, view.col_stride, params.shape.head_dim - d);
      sum += x * x;
    }
    return horizontal_sum<T>(sum);
  }

  double largest_square(const ScoreBlock<Policy>& block, std::int64_t batch,
                        std::int64_t kv_head) const {
    const std::int64_t base = slice_offset(params.key, params.shape.batch_sizes, batch, kv_head);
    double largest = 0.0;
    for (std::int64_t key = 0; key < block.keys; ++key) {
      const double square =
          square_of(params.key, base + (block.first_key + key) * params.key.row_stride);
      largest = square > largest ? square : largest;
    }
    return largest;
  }

  /// The row's own maximum and sum. Nothing is changed where logsumexp is not theirs beyond what
  /// scores of this size round to: somebody has joined it with that of other keys.
  void finish_row(const BackwardScratch<Policy>& scratch, std::int64_t i, T logsumexp,
                  double squares, std::int64_t row) const {
    const Vec<T> maxima = load<T>(lanes_of(scratch, i, 0));
    T maximum = horizontal_max<T>(maxima);
    if (!(maximum > -kInfinity<T>)) return;
    T sum = horizontal_sum<T>(load<T>(lanes_of(scratch, i, 1)) * weights(maxima - maximum));
    if (const T* sink =
            sink_of<T>(params.transform, row / params.shape.q_len % params.shape.query_heads)) {
      const T largest = *sink > maximum ? *sink : maximum;
      sum = sum * weights(broadcast(maximum - largest))[0] + weights(broadcast(*sink - largest))[0];
      maximum = largest;
    }
    const double size = __builtin_fabs(static_cast<double>(logsumexp)) +
                        __builtin_fabs(params.transform.scale) * __builtin_sqrt(squares);
    const double tolerance = size * (sizeof(T) == 8 ? 0x1p-49 : 0x1p-20);
    const double recomputed = maximum + __builtin_log(static_cast<double>(sum));
    if (!(__builtin_fabs(recomputed - logsumexp) <= tolerance)) return;
    *references(row) = maximum;
    *factors(row) = static_cast<T>(1) / sum;
  }
};
