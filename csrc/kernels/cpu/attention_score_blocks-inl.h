// Where the backward pass works: blocks of some queries of one head by a tile of keys, and what of
// the masks concerns each.

template <typename Policy>
struct ScoreBlocks {
  using T = typename Policy::Compute;
  using Scalar = typename Policy::Scalar;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  const TileClass* mask_map;

  /// Of a call's transform, with the scale's sign.
  ScoreFunction<T> function = ScoreFunction<T>::of(params.transform, params.transform.scale, true);

  /// The queries that the window lets see any of some keys.
  Range queries_of(std::int64_t first_key, std::int64_t count) const {
    const Range keys{first_key, first_key + max_of(count, 1)};
    return queries_of_any(params.transform.window, keys, params.shape.q_len);
  }

  /// The block of head `g` of a group, of a tile of `count` keys, whose queries are those of the
  /// plan's query block at `start`. False: no query of it attends to any of the keys.
  bool locate(ScoreBlock<Policy>& block, std::int64_t batch, std::int64_t kv_head, std::int64_t g,
              std::int64_t start, std::int64_t first_key, std::int64_t count, TileClass padding,
              const T* key_bias) const {
    const AttentionShape& shape = params.shape;
    const ScoreTransform& transform = params.transform;
    const std::int64_t head = kv_head * shape.group() + g;
    block.head = g;
    const Range seeing = queries_of(first_key, count);
    block.first_query = max_of(start, seeing.begin);
    const std::int64_t end = min_of(start + plan.query_block, seeing.end);
    block.queries = end - block.first_query;
    if (block.queries <= 0) return false;
    const TileClass mask = mask_class(batch, kv_head, start / plan.query_block, first_key);
    if (mask == TileClass::kEmpty) return false;
    const Range queries{block.first_query, end};
    const Range keys = keys_of_any(transform.window, queries, first_key + count);
    block.key_offset = max_of(keys.begin - first_key, 0) / kKeyUnit * kKeyUnit;
    block.first_key = first_key + block.key_offset;
    block.keys = keys.end - block.first_key;
    block.vectors = (block.keys + kLanes - 1) / kLanes;
    const std::int64_t lanes_end = block.first_key + block.vectors * kLanes;
    block.slice = static_cast<std::uint32_t>(batch * shape.query_heads + head);

    ScoreRow<T>& score = block.score;
    score = ScoreRow<T>::of(function, transform, shape, batch, head, block.first_query);
    if (transform.mask.kind == AttentionMaskKind::kBoolean && mask == TileClass::kFull) {
      score.mask = nullptr;
    }
    // Lanes beyond the tile's keys are excluded as padding is, those beyond the keys of the block's
    // last query by the window.
    if (padding == TileClass::kMixed || lanes_end > first_key + count) {
      score.key_bias = key_bias;
      score.bias_key = first_key;
    }
    const Range lanes{block.first_key, min_of(lanes_end, first_key + count)};
    score.bounded = tile_class(transform.window, queries, lanes) != TileClass::kFull;
    block.modified = score.mask != nullptr || score.key_bias != nullptr || score.bounded ||
                     score.alibi || function.capped;
    return true;
  }

  /// Key padding and the end of the keys as a bias, a whole tile long.
  TileClass load_tile_bias(T* bias, std::int64_t batch, std::int64_t first,
                           std::int64_t count) const {
    const ConstStridedView& padding = params.transform.key_padding;
    const std::uint8_t* bytes = nullptr;
    if (padding.data != nullptr) {
      bytes = static_cast<const std::uint8_t*>(padding.data) +
              slice_offset(padding, params.shape.batch_sizes, batch, 0);
    }
    load_key_bias(bytes, padding.col_stride, first, count, plan.key_tile, bias);
    if (bytes == nullptr) return TileClass::kFull;
    return classify_key_padding(bytes, padding.col_stride, first, count);
  }

  /// K^T or V^T of a tile of keys. Few rows read the tile where it lies.
  void pack_tile(const ConstStridedView& view, std::int64_t base, std::int64_t columns,
                 std::int64_t count, Scalar* panel) const {
    if (plan.few_rows) return;
    const std::int64_t row_stride = view.row_stride;
    for (std::int64_t j = 0; j * kLanes < count; ++j) {
      const std::int64_t first = base + j * kLanes * row_stride;
      pack_lanes<Policy>(
          view.data, params.dtype, view.col_stride, count - j * kLanes, columns,
          [first, row_stride](int lane) { return first + lane * row_stride; }, false,
          panel + j * kLanes, plan.key_tile);
    }
  }

  /// A block's rows of query or grad_out.
  StagedRows<Policy> stage(const ConstStridedView& view, std::int64_t batch, std::int64_t kv_head,
                           const ScoreBlock<Policy>& block, std::int64_t columns, char* buffer,
                           bool wants_rows) const {
    return stage_rows<Policy>(row_address(view, batch, kv_head, block), params.dtype,
                              view.row_stride, view.col_stride, block.queries, columns, buffer,
                              !plan.few_rows, wants_rows);
  }

  /// out[query][key] = left(query) . right(key) of a block: `rows` are the staged rows of `left`,
  /// `panel` is what pack_tile() made of `right`. The forward pass adds up in the same order.
  void multiply(const ConstStridedView& left, const StagedRows<Policy>& rows,
                const ConstStridedView& right, std::int64_t columns, Scalar* panel,
                std::int64_t batch, std::int64_t kv_head, const ScoreBlock<Policy>& block,
                T* out) const {
    if (!plan.few_rows) {
      contract<Policy, false>(block.queries, block.vectors, depth_steps<Policy>(columns),
                              rows.over_columns, panel + block.key_offset, plan.key_tile, out,
                              plan.key_tile);
      return;
    }
    if constexpr (sizeof(T) == 4) {
      float* const left_rows = reinterpret_cast<float*>(panel);  // nobody has packed a tile there
      const std::int64_t padded = round_up(columns, kLanes);
      convert_rows<float>(row_address(left, batch, kv_head, block), params.dtype, left.row_stride,
                          left.col_stride, block.queries, columns, left_rows, padded);
      const std::int64_t first = slice_offset(right, params.shape.batch_sizes, batch, kv_head) +
                                 block.first_key * right.row_stride;
      const RightRows right_rows{.data = element_at(right.data, params.dtype, first),
                                 .row_bytes = right.row_stride * bytes_of(params.dtype),
                                 .count = block.keys,
                                 .columns = columns};
      row_products(params.dtype, block.queries, left_rows, padded, right_rows,
                   block.vectors * kLanes, out, plan.key_tile);
    }
  }

 private:
  /// Of a block's first row in query or grad_out.
  const char* row_address(const ConstStridedView& view, std::int64_t batch, std::int64_t kv_head,
                          const ScoreBlock<Policy>& block) const {
    const std::int64_t head = kv_head * params.shape.group() + block.head;
    return element_at(view.data, params.dtype,
                      slice_offset(view, params.shape.batch_sizes, batch, head) +
                          block.first_query * view.row_stride);
  }

  TileClass mask_class(std::int64_t batch, std::int64_t kv_head, std::int64_t row_tile,
                       std::int64_t key) const {
    const MaskMapPlan& map = plan.mask_map;
    if (!map.used) return TileClass::kFull;
    if (map.row_tiles == 1) row_tile = 0;
    const std::int64_t slice = mask_map_slice(map, params.shape, batch, kv_head);
    return mask_map[(slice * map.row_tiles + row_tile) * map.column_tiles + key / map.column_tile];
  }
};
