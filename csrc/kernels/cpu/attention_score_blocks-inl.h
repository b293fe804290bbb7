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

  /// The first query that sees any key from `first_key` on.
  std::int64_t first_allowed(std::int64_t first_key) const {
    const Range keys{first_key, first_key + 1};
    return queries_of_any(params.transform.window, keys, params.shape.q_len).begin;
  }

  /// The block of head `g` of a group, of a tile of `count` keys, whose queries are those of the
  /// plan's query block at `start`. False: no query of it attends to any of the keys.
  bool locate(ScoreBlock<Policy>& block, std::int64_t batch, std::int64_t kv_head, std::int64_t g,
              std::int64_t start, std::int64_t first_key, std::int64_t count,
              TileClass padding) const {
    const AttentionShape& shape = params.shape;
    const ScoreTransform& transform = params.transform;
    const std::int64_t head = kv_head * shape.group() + g;
    block.head = g;
    block.first_query = max_of(start, first_allowed(first_key));
    const std::int64_t end = min_of(start + plan.query_block, shape.q_len);
    block.queries = end - block.first_query;
    if (block.queries <= 0) return false;
    const TileClass mask = mask_class(batch, kv_head, start / plan.query_block, first_key);
    if (mask == TileClass::kEmpty) return false;
    block.first_key = first_key;
    block.keys = count;
    block.keys = min_of(count, keys_of(transform.window, end - 1, shape.kv_len).end - first_key);
    block.vectors = (block.keys + kLanes - 1) / kLanes;
    // Lanes beyond the keys of the block's last query are keys of none.
    block.diagonal = first_key + min_of(block.vectors * kLanes, count) >
                     keys_of(transform.window, block.first_query, shape.kv_len).end;
    block.adds_mask =
        transform.mask.kind == AttentionMaskKind::kAdditive || mask == TileClass::kMixed;
    block.adds_key_bias = padding == TileClass::kMixed || block.vectors * kLanes > count;
    block.slice = static_cast<std::uint32_t>(batch * shape.query_heads + head);
    if (block.adds_mask) {
      block.mask_row =
          element_at(transform.mask.view.data,
                     transform.mask.kind == AttentionMaskKind::kAdditive ? transform.mask.dtype
                                                                         : ScalarType::kBool,
                     slice_offset(transform.mask.view, shape.batch_sizes, batch, head) +
                         block.first_query * transform.mask.view.row_stride);
    }
    return true;
  }

  /// Key padding and the end of the keys as a bias, a whole tile long.
  TileClass load_key_bias(T* bias, std::int64_t batch, std::int64_t first,
                          std::int64_t count) const {
    const ConstStridedView& padding = params.transform.key_padding;
    for (std::int64_t key = 0; key < plan.key_tile; ++key) {
      bias[key] = key < count ? static_cast<T>(0) : -kInfinity<T>;
    }
    if (padding.data == nullptr) return TileClass::kFull;
    const std::uint8_t* bytes = static_cast<const std::uint8_t*>(padding.data) +
                                slice_offset(padding, params.shape.batch_sizes, batch, 0);
    for (std::int64_t key = 0; key < count; ++key) {
      if (bytes[(first + key) * padding.col_stride]) bias[key] = -kInfinity<T>;
    }
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
                              rows.over_columns, panel, plan.key_tile, out, plan.key_tile);
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
