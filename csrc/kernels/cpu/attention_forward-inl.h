// Transposed flash attention, forward (Dao et al., FlashAttention, arXiv 2205.14135). Lanes are
// queries:
//   S^T (kv_block, sub_tile) = K Q^T,  O^T (value_dim, sub_tile) += V^T P^T,
// so K and V are broadcast from where they lie, and maxima and sums run down the lanes.

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

/// A block of keys, staged.
template <typename Policy>
struct KeyBlock {
  LeftOperand<Policy> key;    // over columns
  LeftOperand<Policy> value;  // over rows
  std::int64_t first;
  std::int64_t count;
  TileClass padding;
  const std::uint8_t* padding_bytes;  // of key 0, where there is key padding

  /// Keys [begin, end) of it; begin lies whole kKeyUnits behind the first.
  KeyBlock part(std::int64_t begin, std::int64_t end) const {
    KeyBlock part = *this;
    part.first = begin;
    part.count = end - begin;
    part.key.data += (begin - first) * key.row_stride;
    part.value.data += (begin - first) / Policy::kDepth * value.depth_stride;
    return part;
  }
};

template <typename Policy>
struct ForwardKernel {
  using T = typename Policy::Compute;
  using Scalar = typename Policy::Scalar;
  using Int = typename Simd<T>::Int;
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kSubTile = kMaxVectors * kLanes;

  const AttentionForwardParams& params;
  const ForwardPlan& plan;
  const TileClass* mask_map;
  char* workspace;
  DropoutState dropout;
  ScoreFunction<T> function = ScoreFunction<T>::of(params.transform, scale_size(),
                                                   ScoreFunction<T>::is_natural(params.transform));
  ScoreDomain<T> domain = ScoreDomain<T>::of(function.natural ? 1.0 : scale_size());
  KeySplits<Policy> splits{params, plan, workspace, dropout, domain};

  /// Of the scale; its sign goes with the queries.
  double scale_size() const {
    return params.transform.scale < 0.0 ? -params.transform.scale : params.transform.scale;
  }

  std::int64_t group() const { return params.shape.query_heads / params.shape.kv_heads; }

  void set_up_tile(QueryTile<Policy>& tile, ScratchArea& scratch) const {
    const AttentionShape& shape = params.shape;
    tile.panel = scratch.take<Scalar>((shape.head_dim + 1) / Policy::kDepth * kSubTile);
    tile.out = scratch.take<T>(shape.value_dim * kSubTile);
    tile.reference = scratch.take<T>(kSubTile);
    tile.maximum = scratch.take<T>(kSubTile);
    tile.sum = scratch.take<T>(kSubTile);
    tile.first_key = scratch.take<Int>(kSubTile);
    tile.last_key = scratch.take<Int>(kSubTile);
    tile.alibi_slope = scratch.take<T>(kSubTile);
    tile.alibi_position = scratch.take<T>(kSubTile);
    tile.query = scratch.take<std::uint32_t>(kSubTile);
    tile.slice = scratch.take<std::uint32_t>(kSubTile);
    tile.query_offset = scratch.take<std::int64_t>(kSubTile);
    tile.out_offset = scratch.take<std::int64_t>(kSubTile);
    tile.mask_offset = scratch.take<std::int64_t>(kSubTile);
  }

  void load_tile(QueryTile<Policy>& tile, std::int64_t batch, std::int64_t kv_head,
                 std::int64_t first_row, std::int64_t rows) const {
    const AttentionShape& shape = params.shape;
    const ScoreTransform& transform = params.transform;
    const std::int64_t heads = group();
    const std::int64_t first_head = kv_head * heads;
    tile.count = min_of(rows - first_row, kSubTile);
    tile.vectors = static_cast<int>((tile.count + kLanes - 1) / kLanes);
    tile.row_tile = first_row / kSubTile;
    tile.started = false;
    const std::int64_t query_base =
        slice_offset(params.query, shape.batch_sizes, batch, first_head);
    const std::int64_t out_base = slice_offset(params.out, shape.batch_sizes, batch, first_head);
    const std::int64_t mask_base =
        transform.mask.kind == AttentionMaskKind::kNone
            ? 0
            : slice_offset(transform.mask.view, shape.batch_sizes, batch, first_head);
    std::int64_t query = first_row / heads;
    std::int64_t head = first_row % heads;
    for (int lane = 0; lane < tile.vectors * kLanes; ++lane) {
      // Lanes beyond the last row repeat it: every address stays valid.
      tile.query_offset[lane] =
          query_base + head * params.query.head_stride + query * params.query.row_stride;
      tile.out_offset[lane] =
          out_base + head * params.out.head_stride + query * params.out.row_stride;
      tile.mask_offset[lane] = mask_base + head * transform.mask.view.head_stride +
                               query * transform.mask.view.row_stride;
      tile.query[lane] = static_cast<std::uint32_t>(query);
      tile.slice[lane] = static_cast<std::uint32_t>(batch * shape.query_heads + first_head + head);
      const Range keys = keys_of(transform.window, query, shape.kv_len);
      tile.first_key[lane] = static_cast<Int>(keys.begin);
      tile.last_key[lane] = static_cast<Int>(keys.end - 1);
      if (transform.alibi.data != nullptr) {
        tile.alibi_slope[lane] = alibi_slope(transform.alibi, shape, batch, first_head + head);
        tile.alibi_position[lane] = alibi_position<T>(transform.window, query);
      }
      if (lane + 1 < tile.count && ++head == heads) {
        head = 0;
        ++query;
      }
    }
    const Range queries{first_row / heads, (first_row + tile.count - 1) / heads + 1};
    tile.any_keys = keys_of_any(transform.window, queries, shape.kv_len);
    tile.all_keys = keys_of_all(transform.window, queries, shape.kv_len);
    for (int vector = 0; vector < tile.vectors; ++vector) {
      const std::int64_t* offsets = tile.query_offset + vector * kLanes;
      pack_lanes<Policy>(
          params.query.data, params.dtype, params.query.col_stride, tile.count - vector * kLanes,
          shape.head_dim, [offsets](int lane) { return offsets[lane]; },
          params.transform.scale < 0.0, tile.panel + vector * kLanes, tile.vectors * kLanes);
    }
  }

  TileClass mask_class(const QueryTile<Policy>& tile, std::int64_t map_slice,
                       std::int64_t first_key) const {
    if (!plan.mask_map.used) return TileClass::kFull;
    const MaskMapPlan& map = plan.mask_map;
    const std::int64_t row_tile = map.row_tiles == 1 ? 0 : tile.row_tile;
    return mask_map[(map_slice * map.row_tiles + row_tile) * map.column_tiles +
                    first_key / map.column_tile];
  }

  /// Products become scores. `excludes`: the mask, padding or the window leave some pairs out.
  void transform_scores(const ScoreColumns<T>& columns, const QueryTile<Policy>& tile,
                        const KeyBlock<Policy>& block, TileClass mask, TileClass window) const {
    const ScoreTransform& transform = params.transform;
    const ConstStridedView& view = transform.mask.view;
    const bool additive = transform.mask.kind == AttentionMaskKind::kAdditive;
    const bool masked = additive || mask == TileClass::kMixed;
    if (masked || function.natural) {
      const ScalarType type = additive ? transform.mask.dtype : ScalarType::kBool;
      const bool uniform = view.row_stride == 0 && (view.head_stride == 0 || group() == 1);
      const auto apply = [&](auto capped, auto alibi) {
        ScoreColumns<T>::template apply<capped.value, alibi.value>(
            columns, function, tile.alibi_slope, tile.alibi_position, masked, type, view.col_stride,
            uniform, [&](int lane) { return element_at(view.data, type, tile.mask_offset[lane]); });
      };
      if (transform.alibi.data == nullptr) {
        function.capped ? apply(Flag<true>{}, Flag<false>{}) : apply(Flag<false>{}, Flag<false>{});
      } else {
        function.capped ? apply(Flag<true>{}, Flag<true>{}) : apply(Flag<false>{}, Flag<true>{});
      }
    }
    if (block.padding == TileClass::kMixed) {
      columns.exclude_padding(block.padding_bytes, transform.key_padding.col_stride);
    }
    if (window == TileClass::kMixed) {
      block.first < tile.all_keys.begin
          ? columns.template exclude_outside<true>(tile.first_key, tile.last_key)
          : columns.template exclude_outside<false>(tile.first_key, tile.last_key);
    }
  }

  /// One (tile, block): scores, softmax, weighted values.
  template <int kVectors>
  void process(QueryTile<Policy>& tile, const KeyBlock<Policy>& block, T* scores,
               TileClass mask) const {
    constexpr int kStride = kVectors * kLanes;
    const AttentionShape& shape = params.shape;
    contract_rows<Policy, kVectors, false>(block.count,
                                           (shape.head_dim + Policy::kDepth - 1) / Policy::kDepth,
                                           block.key, tile.panel, kStride, scores, kStride);
    const bool whole =
        block.first >= tile.all_keys.begin && block.first + block.count <= tile.all_keys.end;
    const bool excludes = !whole || mask == TileClass::kMixed ||
                          params.transform.mask.kind == AttentionMaskKind::kAdditive ||
                          block.padding == TileClass::kMixed;
    if (excludes || function.natural) {
      const ScoreColumns<T> columns{scores, kStride, kVectors, block.first, block.count};
      transform_scores(columns, tile, block, mask, whole ? TileClass::kFull : TileClass::kMixed);
    }
    if (excludes) {
      online_softmax<Policy, kVectors, true>(scores, block.count, tile, shape.value_dim, domain);
    } else {
      online_softmax<Policy, kVectors, false>(scores, block.count, tile, shape.value_dim, domain);
    }
    if (dropout.active) {
      drop_weights_of_queries<T>(scores, kStride, block.count, block.first, kVectors, tile.query,
                                 tile.slice, dropout);
    }
    const Scalar* weights = reinterpret_cast<const Scalar*>(scores);
    std::int64_t depth = block.count;
    if constexpr (Policy::kDepth == 2) {
      depth = (block.count + 1) / 2;
      pair_weights<Policy, kVectors>(scores, block.count);
    }
    if (tile.started) {
      contract_rows<Policy, kVectors, true>(shape.value_dim, depth, block.value, weights, kStride,
                                            tile.out, kStride);
    } else {
      contract_rows<Policy, kVectors, false>(shape.value_dim, depth, block.value, weights, kStride,
                                             tile.out, kStride);
      tile.started = true;
    }
  }

  /// Normalises and writes out and logsumexp.
  void finish(QueryTile<Policy>& tile, std::int64_t first_row, std::int64_t batch,
              std::int64_t kv_head) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t heads = group();
    const int stride = tile.vectors * kLanes;
    if (!tile.started) {
      for (std::int64_t i = 0; i < shape.value_dim * stride; ++i) tile.out[i] = 0;
    }
    T* const logsumexp = static_cast<T*>(params.logsumexp);
    for (int vector = 0; vector < tile.vectors; ++vector) {
      const std::int64_t count = min_of(tile.count - vector * kLanes, kLanes);
      const Vec<T> sum = load<T>(tile.sum + vector * kLanes);
      Vec<T> inverse = sum == Vec<T>{} ? Vec<T>{} : static_cast<T>(dropout.scale) / sum;
      const bool totals = logsumexp != nullptr || params.transform.sink != nullptr;
      for (std::int64_t i = 0; totals && i < count; ++i) {
        const std::int64_t lane = vector * kLanes + i;
        const std::int64_t row = first_row + lane;
        const std::int64_t head = kv_head * heads + row % heads;
        const RowTotal<T> total =
            row_total(domain, tile.maximum[lane], tile.reference[lane], tile.sum[lane],
                      dropout.scale, sink_of<T>(params.transform, head));
        inverse[i] = total.inverse;
        if (logsumexp == nullptr) continue;
        logsumexp[logsumexp_row(params, batch * shape.query_heads + head, row / heads)] =
            total.logsumexp;
      }
      const std::int64_t* offsets = tile.out_offset + vector * kLanes;
      unpack_lanes<T>(tile.out + vector * kLanes, stride, count, shape.value_dim, inverse,
                      params.out.data, params.dtype, params.out.col_stride,
                      [offsets](std::int64_t lane) { return offsets[lane]; });
    }
  }

  /// One of the plan's units: longest first where causal.
  void run_unit(int worker, std::int64_t unit) const {
    run_task(worker, unit / plan.kv_splits % plan.pairs,
             plan.row_tiles - 1 - unit / plan.kv_splits / plan.pairs, unit % plan.kv_splits);
  }

  void join_unit(std::int64_t unit) const { splits.join_unit(unit); }

  void run_task(int worker, std::int64_t pair, std::int64_t row_tile, std::int64_t split) const {
    const AttentionShape& shape = params.shape;
    const ScoreTransform& transform = params.transform;
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t kv_head = pair % shape.kv_heads;
    const std::int64_t map_slice =
        plan.mask_map.used ? mask_map_slice(plan.mask_map, shape, batch, kv_head) : 0;
    ScratchArea scratch{workspace + plan.worker_offset + worker * plan.worker_bytes};
    char* key_buffer = scratch.take<char>(staged_rows_bytes<Policy>(plan.kv_block, shape.head_dim));
    char* value_buffer =
        scratch.take<char>(staged_rows_bytes<Policy>(plan.kv_block, shape.value_dim));
    T* scores = scratch.take<T>(plan.kv_block * kSubTile);

    QueryTile<Policy> tiles[kMaxSubTiles];
    const std::int64_t first_row = row_tile * plan.super_tile;
    const std::int64_t last_row = min_of(first_row + plan.super_tile, plan.rows);
    int num_tiles = 0;
    for (std::int64_t row = first_row; row < last_row; row += kSubTile) {
      QueryTile<Policy>& tile = tiles[num_tiles++];
      set_up_tile(tile, scratch);
      load_tile(tile, batch, kv_head, row, last_row);
      for (int j = 0; j < kMaxVectors; ++j) {
        store<T>(tile.reference + j * kLanes, broadcast(-kInfinity<T>));
        store<T>(tile.maximum + j * kLanes, broadcast(-kInfinity<T>));
        store<T>(tile.sum + j * kLanes, Vec<T>{});
      }
    }

    const Range keys = plan.keys_of_task(params, row_tile, split);
    const KeyRows rows = KeyRows::of(params, batch, kv_head);
    const std::uint8_t* padding = nullptr;
    if (transform.key_padding.data != nullptr) {
      padding = static_cast<const std::uint8_t*>(transform.key_padding.data) +
                slice_offset(transform.key_padding, shape.batch_sizes, batch, 0);
    }
    for (std::int64_t first = keys.begin; first < keys.end; first += plan.kv_block) {
      KeyBlock<Policy> block{};
      block.first = first;
      block.count = min_of(plan.kv_block, keys.end - first);
      block.padding_bytes = padding;
      block.padding =
          padding == nullptr
              ? TileClass::kFull
              : classify_key_padding(padding, transform.key_padding.col_stride, first, block.count);
      if (block.padding == TileClass::kEmpty) continue;
      bool staged = false;
      for (int t = 0; t < num_tiles; ++t) {
        QueryTile<Policy>& tile = tiles[t];
        const std::int64_t begin = max_of(first, tile.any_keys.begin / kKeyUnit * kKeyUnit);
        const std::int64_t end = min_of(first + block.count, tile.any_keys.end);
        if (begin >= end) continue;
        const TileClass mask = mask_class(tile, map_slice, first);
        if (mask == TileClass::kEmpty) continue;
        if (!staged) {
          stage(block, rows, key_buffer, value_buffer);
          staged = true;
        }
        prefetch_share(first + plan.kv_block, keys.end, t, num_tiles, rows);
        const KeyBlock<Policy> visible = block.part(begin, end);
        switch (tile.vectors) {
          case 1:
            process<1>(tile, visible, scores, mask);
            break;
          case 2:
            process<2>(tile, visible, scores, mask);
            break;
          default:
            process<kMaxVectors>(tile, visible, scores, mask);
        }
      }
    }
    for (int t = 0; t < num_tiles; ++t) {
      const std::int64_t row = first_row + t * kSubTile;
      if (plan.kv_splits > 1) {
        splits.store(tiles[t], splits.partial_of(pair, split, row));
      } else {
        finish(tiles[t], row, batch, kv_head);
      }
    }
  }

  /// Asks for the rows of the next block that fall to tile `t`, while this one is computed: left to
  /// the hardware, four broadcast streams of short rows arrive late (measured 5% of fp32).
  void prefetch_share(std::int64_t first, std::int64_t kv_end, int t, int num_tiles,
                      const KeyRows& rows) const {
    const std::int64_t count = min_of(plan.kv_block, kv_end - first);
    const std::int64_t begin = first + count * t / num_tiles;
    const std::int64_t end = first + count * (t + 1) / num_tiles;
    const std::int64_t bytes = bytes_of(key_type(params));
    const auto prefetch_rows = [bytes](const ConstStridedView& view, const char* row,
                                       std::int64_t count, std::int64_t columns) {
      if (view.col_stride != 1) return;
      for (; count > 0; --count, row += view.row_stride * bytes) {
        for (std::int64_t byte = 0; byte < columns * bytes; byte += 64) {
          __builtin_prefetch(row + byte, 0, 2);
        }
      }
    };
    rows.for_pieces(begin, end - begin, [&](const RowPiece& piece) {
      prefetch_rows(params.key, piece.key, piece.count, params.shape.head_dim);
      prefetch_rows(params.value, piece.value, piece.count, params.shape.value_dim);
    });
  }

  void stage(KeyBlock<Policy>& block, const KeyRows& rows, char* key_buffer,
             char* value_buffer) const {
    const AttentionShape& shape = params.shape;
    const ScalarType type = key_type(params);
    const RowPiece piece = rows.piece(block.first, block.count);
    const bool whole = piece.count == block.count && is_staged_from<Policy>(type);
    if (whole) {
      block.key = stage_rows<Policy>(piece.key, type, params.key.row_stride, params.key.col_stride,
                                     block.count, shape.head_dim, key_buffer, true, false)
                      .over_columns;
      block.value =
          stage_rows<Policy>(piece.value, type, params.value.row_stride, params.value.col_stride,
                             block.count, shape.value_dim, value_buffer, false, true)
              .over_rows;
    } else {
      GatheredRows<Policy> keys{key_buffer, block.count, shape.head_dim};
      GatheredRows<Policy> values{value_buffer, block.count, shape.value_dim};
      rows.for_pieces(block.first, block.count, [&](const RowPiece& part) {
        keys.add(part.key, type, params.key, part.count);
        values.add(part.value, type, params.value, part.count);
      });
      block.key = keys.over_columns();
      block.value = values.over_rows();
    }
    block.key.far = block.value.far = whole && type == kNativeType<Policy>;
  }
};

/// Runs the plan: mask map, tasks, then the join of the splits.
template <typename Policy>
static void run_forward(const AttentionForwardParams& params, const ForwardPlan& plan,
                        const TaskRunner& runner, char* workspace) {
  TileClass* map = reinterpret_cast<TileClass*>(workspace + plan.mask_map.offset);
  if (plan.mask_map.used) {
    build_mask_map(params.transform.mask, params.shape, plan.mask_map, params.shape.group(), runner,
                   map);
  }
  const ForwardKernel<Policy> kernel{params, plan, map, workspace, dropout_state(params)};
  run_tasks(runner, plan.units(),
            [&kernel](int worker, std::int64_t unit) { kernel.run_unit(worker, unit); });
  run_tasks(runner, plan.join_units(),
            [&kernel](int, std::int64_t unit) { kernel.join_unit(unit); });
}
