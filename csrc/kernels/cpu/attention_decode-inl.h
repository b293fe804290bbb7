// Few queries against long keys and values (FlashDecoding's case): lanes run along head_dim, K and
// V are streamed once for all grouped rows. Bound by memory bandwidth.

/// kRows: 1, 2 or 4 rows at once, of which params' may be fewer (3 of 4).
template <typename Loader, int kRows>
struct DecodeKernel {
  using Base = ForwardKernel<FloatContraction>;
  static constexpr int kLanes = kFloatLanes;
  static constexpr std::int64_t kElement = kElementBytes<Loader>;
  static constexpr int kKeysPerStep = 8;

  const Base& base;
  const bool far = lies_beyond_caches(base.params.shape);

  /// Keys and values that a core's own caches do not hold from one call to the next.
  static bool lies_beyond_caches(const AttentionShape& shape) {
    constexpr std::int64_t kCacheBytes = std::int64_t{4} << 20;
    return shape.batch() * shape.kv_heads * shape.kv_len * (shape.head_dim + shape.value_dim) *
               kElement >
           kCacheBytes;
  }

  /// Rows of fp32 are long enough for the hardware, and what lies in a cache already only costs the
  /// instructions.
  bool prefetches() const { return kElement != 4 && far; }

  /// The rows a block later than a piece's, to be asked for meanwhile; the piece itself where there
  /// are none, or not in one page.
  RowPiece twin_of(const KeyRows& rows, const RowPiece& piece, std::int64_t end) const {
    const std::int64_t first = piece.first + base.plan.kv_block;
    if (!prefetches() || first + piece.count > end) return piece;
    const RowPiece twin = rows.piece(first, piece.count);
    return twin.count == piece.count ? twin : piece;
  }

  /// out[row] += sum over keys of weight(row, key) * value(key). `ahead`: see RightRows.
  void weighted_values(const float* weights, const char* values, std::int64_t row_bytes,
                       std::int64_t count, std::int64_t ahead, float* out,
                       std::int64_t padded) const {
    const std::int64_t value_dim = base.params.shape.value_dim;
    const std::int64_t whole = value_dim / kLanes * kLanes;
    std::int64_t key = 0;
    for (; key + kKeysPerStep <= count; key += kKeysPerStep) {
      if (ahead != 0) {
        for (int i = 0; i < kKeysPerStep; ++i) {
          prefetch_bytes(values + (key + i) * row_bytes + ahead, value_dim * kElement);
        }
      }
      std::int64_t d = 0;
      for (; d + 2 * kLanes <= whole; d += 2 * kLanes) {
        add_weighted<2, kKeysPerStep>(weights + key, values + key * row_bytes, row_bytes, out,
                                      padded, d);
      }
      for (; d < whole; d += kLanes) {
        add_weighted<1, kKeysPerStep>(weights + key, values + key * row_bytes, row_bytes, out,
                                      padded, d);
      }
    }
    for (; key < count; ++key) {
      for (std::int64_t d = 0; d < whole; d += kLanes) {
        add_weighted<1, 1>(weights + key, values + key * row_bytes, row_bytes, out, padded, d);
      }
    }
    if (whole == value_dim) return;
    for (std::int64_t k = 0; k < count; ++k) {
      const FloatVector v = load_elements<float>(values + k * row_bytes + whole * kElement,
                                                 Loader::kType, 1, value_dim - whole);
      for (int row = 0; row < kRows; ++row) {
        float* target = out + row * padded + whole;
        store<float>(target, load<float>(target) + weights[row * base.plan.kv_block + k] * v);
      }
    }
  }

  template <int kVectors, int kKeys>
  TORCH_EXT_INLINE void accumulate(FloatVector (&sum)[kRows][kVectors], const float* weights,
                                   std::int64_t weight_stride, const char* values,
                                   std::int64_t row_bytes) {
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const FloatVector v = Loader::at(values + k * row_bytes + j * kLanes * kElement);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sum[row][j] += weights[row * weight_stride + k] * v;
      }
    }
  }

  template <int kVectors, int kKeys>
  void add_weighted(const float* weights, const char* values, std::int64_t row_bytes, float* out,
                    std::int64_t padded, std::int64_t d) const {
    FloatVector sum[kRows][kVectors];
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < kVectors; ++j)
        sum[row][j] = load<float>(out + row * padded + d + j * kLanes);
    }
    accumulate<kVectors, kKeys>(sum, weights, base.plan.kv_block, values + d * kElement, row_bytes);
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < kVectors; ++j)
        store<float>(out + row * padded + d + j * kLanes, sum[row][j]);
    }
  }

  struct Row {
    std::int64_t query_offset, out_offset;
    std::int64_t head;
    std::int64_t slice;
    std::int64_t query;
    ScoreRow<float> score;
    float maximum, reference, sum;  // as of a QueryTile
  };

  /// Products of a block become scores.
  static void transform_scores(const ScoreRow<float>& row, std::int64_t first, std::int64_t count,
                               float* scores) {
    for (std::int64_t key = 0; key < count; key += kLanes) {
      FloatVector unused;
      store<float>(scores + key,
                   ScoreRow<float>::apply<true>(row, load<float>(scores + key), first + key,
                                                min_of(count - key, kLanes), unused));
    }
  }

  /// Scores become weights; the row's maximum, sum and output follow.
  void softmax(Row& row, float* scores, std::int64_t count, float* out, std::int64_t padded) const {
    for (std::int64_t key = count; key < round_up(count, kLanes); ++key) {
      scores[key] = -kInfinity<float>;
    }
    FloatVector best = broadcast(row.maximum);
    for (std::int64_t key = 0; key < count; key += kLanes) {
      best = vector_max(best, load<float>(scores + key));
    }
    const ScoreDomain<float>& domain = base.domain;
    const FloatVector lowest = broadcast(domain.lowest);
    const FloatVector log2 = broadcast(domain.log2);
    row.maximum = horizontal_max<float>(best);
    if (row.maximum > row.reference + domain.growth) {
      const float shrink =
          exp2_product(vector_max(lowest, broadcast(row.reference - row.maximum)), log2)[0];
      row.sum *= shrink;
      row.reference = row.maximum;
      for (std::int64_t d = 0; d < padded; d += kLanes) {
        store<float>(out + d, load<float>(out + d) * shrink);
      }
    }
    const float reference = row.reference == -kInfinity<float> ? 0.0f : row.reference;
    FloatVector sum{};
    for (std::int64_t key = 0; key < count; key += kLanes) {
      const FloatVector x = load<float>(scores + key) - reference;
      const FloatVector weight =
          x < domain.lowest ? FloatVector{} : exp2_product(vector_max(lowest, x), log2);
      sum += weight;
      store<float>(scores + key, weight);
    }
    row.sum += horizontal_sum<float>(sum);
  }

  void drop_weights(const Row& row, std::int64_t first, std::int64_t count, float* weights) const {
    for (std::int64_t key = 0; key < count; key += kDropoutKeysPerCall) {
      PhiloxBlock counter{{static_cast<std::uint32_t>(row.query),
                           static_cast<std::uint32_t>((first + key) / kDropoutKeysPerCall),
                           static_cast<std::uint32_t>(row.slice), 0u}};
      const PhiloxBlock block = philox4x32_10(counter, base.dropout.seed);
      for (std::int64_t i = 0; i < min_of(count - key, kDropoutKeysPerCall); ++i) {
        const std::uint32_t bits = block.word[i / 2] >> (16 * (i % 2)) & 0xFFFFu;
        if (bits < base.dropout.threshold) weights[key + i] = 0.0f;
      }
    }
  }

  /// One of the plan's units.
  void run_unit(int worker, std::int64_t unit) const {
    run_task(worker, unit / base.plan.kv_splits, unit % base.plan.kv_splits);
  }

  void join_unit(std::int64_t unit) const { base.splits.join_unit(unit); }

  void run_task(int worker, std::int64_t pair, std::int64_t split) const {
    const AttentionForwardParams& params = base.params;
    const ForwardPlan& plan = base.plan;
    const AttentionShape& shape = params.shape;
    const ScoreTransform& transform = params.transform;
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t kv_head = pair % shape.kv_heads;
    const std::int64_t heads = base.group();
    const std::int64_t query_padded = round_up(shape.head_dim, kLanes);
    const std::int64_t value_padded = round_up(shape.value_dim, kLanes);
    ScratchArea scratch{base.workspace + plan.worker_offset + worker * plan.worker_bytes};
    float* query = scratch.take<float>(kDecodeRows * query_padded);
    float* out = scratch.take<float>(kDecodeRows * value_padded);
    float* block_out = scratch.take<float>(kDecodeRows * value_padded);
    float* scores = scratch.take<float>(kDecodeRows * plan.kv_block + kLanes);
    float* key_bias = scratch.take<float>(plan.kv_block);

    Row rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      Row& row = rows[r];
      const std::int64_t index = min_of(r, plan.rows - 1);  // a missing row repeats the last one
      const std::int64_t head = kv_head * heads + index % heads;
      row.query = index / heads;
      row.slice = batch * shape.query_heads + head;
      row.query_offset = slice_offset(params.query, shape.batch_sizes, batch, head) +
                         row.query * params.query.row_stride;
      row.out_offset = slice_offset(params.out, shape.batch_sizes, batch, head) +
                       row.query * params.out.row_stride;
      row.head = head;
      row.score = ScoreRow<float>::of(base.function, transform, shape, batch, head, row.query);
      row.score.bounded = transform.window.bounds_keys();
      row.maximum = row.reference = -kInfinity<float>;
      row.sum = 0.0f;
      for (std::int64_t d = 0; d < query_padded; d += kLanes) {
        store<float>(
            query + r * query_padded + d,
            load_elements<float>(element_at(params.query.data, params.dtype,
                                            row.query_offset + d * params.query.col_stride),
                                 params.dtype, params.query.col_stride, shape.head_dim - d) *
                (params.transform.scale < 0.0 ? -1.0f : 1.0f));
      }
      for (std::int64_t d = 0; d < value_padded; d += kLanes) {
        store<float>(out + r * value_padded + d, FloatVector{});
      }
    }
    const std::uint8_t* padding = nullptr;
    if (transform.key_padding.data != nullptr) {
      padding = static_cast<const std::uint8_t*>(transform.key_padding.data) +
                slice_offset(transform.key_padding, shape.batch_sizes, batch, 0);
    }
    const KeyRows key_rows = KeyRows::of(params, batch, kv_head);
    const std::int64_t map_slice =
        plan.mask_map.used ? mask_map_slice(plan.mask_map, shape, batch, kv_head) : 0;
    const std::int64_t key_bytes = params.key.row_stride * kElement;
    const std::int64_t value_bytes = params.value.row_stride * kElement;
    const Range task_keys = plan.keys_of_task(params, 0, split);
    const bool modified = base.function.natural ||
                          transform.mask.kind != AttentionMaskKind::kNone ||
                          transform.window.bounds_keys() || padding != nullptr;
    for (std::int64_t first = task_keys.begin; first < task_keys.end; first += plan.kv_block) {
      const std::int64_t count = min_of(plan.kv_block, task_keys.end - first);
      if (plan.mask_map.used &&
          base.mask_map[map_slice * plan.mask_map.column_tiles + first / plan.kv_block] ==
              TileClass::kEmpty) {
        continue;
      }
      if (padding != nullptr) {
        const std::int64_t stride = transform.key_padding.col_stride;
        const TileClass ignored = classify_key_padding(padding, stride, first, count);
        if (ignored == TileClass::kEmpty) continue;
        load_key_bias(padding, stride, first, count, plan.kv_block, key_bias);
        for (Row& row : rows) {
          row.score.key_bias = ignored == TileClass::kMixed ? key_bias : nullptr;
          row.score.bias_key = first;
        }
      }
      key_rows.for_pieces(first, count, [&](const RowPiece& piece) {
        const char* next = twin_of(key_rows, piece, task_keys.end).key;
        const RightRows right{.data = piece.key,
                              .row_bytes = key_bytes,
                              .count = piece.count,
                              .columns = shape.head_dim,
                              .ahead = next - piece.key};
        row_products<Loader, kRows>(query, query_padded, right, piece.count,
                                    scores + (piece.first - first), plan.kv_block);
      });
      for (int r = 0; r < kRows; ++r) {
        float* row_scores = scores + r * plan.kv_block;
        if (modified) transform_scores(rows[r].score, first, count, row_scores);
        softmax(rows[r], row_scores, count, out + r * value_padded, value_padded);
        if (base.dropout.active) drop_weights(rows[r], first, count, row_scores);
      }
      for (std::int64_t d = 0; d < kRows * value_padded; d += kLanes) {
        store<float>(block_out + d, FloatVector{});
      }
      key_rows.for_pieces(first, count, [&](const RowPiece& piece) {
        const char* next = twin_of(key_rows, piece, task_keys.end).value;
        weighted_values(scores + (piece.first - first), piece.value, value_bytes, piece.count,
                        next - piece.value, block_out, value_padded);
      });
      for (std::int64_t d = 0; d < kRows * value_padded; d += kLanes) {
        store<float>(out + d, load<float>(out + d) + load<float>(block_out + d));
      }
    }
    for (std::int64_t r = 0; r < plan.rows; ++r) {
      const Row& row = rows[r];
      if (plan.kv_splits > 1) {
        float* partial = base.splits.partial_of(pair, split, r);
        for (std::int64_t d = 0; d < shape.value_dim; ++d) partial[d] = out[r * value_padded + d];
        partial[shape.value_dim] = row.maximum;
        partial[shape.value_dim + 1] = row.reference;
        partial[shape.value_dim + 2] = row.sum;
        continue;
      }
      const RowTotal<float> total =
          row_total(base.domain, row.maximum, row.reference, row.sum, base.dropout.scale,
                    sink_of<float>(transform, row.head));
      for (std::int64_t d = 0; d < shape.value_dim; d += kLanes) {
        store_elements<float>(
            element_at(params.out.data, params.dtype, row.out_offset + d * params.out.col_stride),
            params.dtype, params.out.col_stride, shape.value_dim - d,
            load<float>(out + r * value_padded + d) * total.inverse);
      }
      if (params.logsumexp != nullptr) {
        static_cast<float*>(params.logsumexp)[logsumexp_row(params, row.slice, row.query)] =
            total.logsumexp;
      }
    }
  }
};

/// body(kernel) with the decoding kernel of a plan's rows.
template <typename Loader, typename Body>
static void with_decode_rows(const ForwardKernel<FloatContraction>& base, const Body& body) {
  if (base.plan.rows == 1) {
    body(DecodeKernel<Loader, 1>{base});
  } else if (base.plan.rows == 2) {
    body(DecodeKernel<Loader, 2>{base});
  } else {
    body(DecodeKernel<Loader, 4>{base});
  }
}

template <typename Body>
static void with_decode_kernel(const ForwardKernel<FloatContraction>& base, const Body& body) {
  switch (key_type(base.params)) {
    case ScalarType::kInt8:
      with_decode_rows<LoadInt8>(base, body);
      break;
    case ScalarType::kFloat8E4M3:
      with_decode_rows<LoadFloat8>(base, body);
      break;
    case ScalarType::kBFloat16:
      with_decode_rows<LoadBf16>(base, body);
      break;
    case ScalarType::kFloat16:
      with_decode_rows<LoadFp16>(base, body);
      break;
    default:
      with_decode_rows<LoadFloat>(base, body);
  }
}

static void run_decode(const AttentionForwardParams& params, const ForwardPlan& plan,
                       const TaskRunner& runner, char* workspace) {
  TileClass* map = reinterpret_cast<TileClass*>(workspace + plan.mask_map.offset);
  if (plan.mask_map.used) {
    build_mask_map(params.transform.mask, params.shape, plan.mask_map, params.shape.group(), runner,
                   map);
  }
  const ForwardKernel<FloatContraction> base{params, plan, map, workspace, dropout_state(params)};
  with_decode_kernel(base, [&](const auto& kernel) {
    run_tasks(runner, plan.units(),
              [&kernel](int worker, std::int64_t unit) { kernel.run_unit(worker, unit); });
  });
  run_tasks(runner, plan.join_units(),
            [&base](int, std::int64_t unit) { base.splits.join_unit(unit); });
}
