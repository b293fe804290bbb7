// Flash attention, backward, in one pass over the scores. Lanes are keys:
//   S (queries, keys) = Q K^T,  dP = dO V^T,  P and dS from them,
//   dV^T (value_dim, keys) += dO^T P,  dK^T (head_dim, keys) += Q^T dS,  dQ (queries, head_dim) +=
//   dS K.
// K^T and V^T are packed once per tile of keys and stay in the second-level cache with dK^T and
// dV^T; Q and dO are broadcast from where they lie. Five products; a pass of its own for dQ would
// make them seven.

template <typename Policy>
struct BackwardKernel {
  using T = typename Policy::Compute;
  using Scalar = typename Policy::Scalar;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  const TileClass* mask_map;
  char* workspace;
  DropoutState dropout;
  MaskGradient<Policy> mask_gradient{params, plan, workspace};

  static constexpr T kLowestLogsumexp = static_cast<T>(sizeof(T) == 8 ? -1e16 : -1e8);

  std::int64_t group() const { return params.shape.group(); }

  BackwardScratch<Policy> scratch_of(int worker) const {
    ScratchArea area{workspace + plan.worker_offset + worker * plan.worker_bytes};
    const AttentionShape& shape = params.shape;
    const std::int64_t keys = plan.key_tile;
    const std::int64_t queries = plan.query_block + 1;
    const std::int64_t rows = shape.q_len * group();
    BackwardScratch<Policy> scratch{};
    scratch.key_panel = area.take<Scalar>((shape.head_dim + 1) * keys);
    scratch.value_panel = area.take<Scalar>((shape.value_dim + 1) * keys);
    scratch.key_rows = area.take<char>(staged_rows_bytes<Policy>(keys, shape.head_dim));
    scratch.grad_key = area.take<T>(shape.head_dim * keys);
    scratch.grad_value = area.take<T>(shape.value_dim * keys);
    scratch.weight = area.take<T>(queries * keys);
    scratch.grad_score = area.take<T>(queries * keys);
    if constexpr (Policy::kDepth == 2) {
      scratch.weight_pairs = area.take<Scalar>(queries * keys);
      scratch.grad_score_pairs = area.take<Scalar>(queries * keys);
      scratch.grad_score_rows = area.take<std::uint16_t>(queries * keys * 2);
    }
    scratch.query_rows =
        area.take<char>(staged_rows_bytes<Policy>(plan.query_block, shape.head_dim));
    scratch.grad_out_rows =
        area.take<char>(staged_rows_bytes<Policy>(plan.query_block, shape.value_dim));
    scratch.dropout_bits = area.take<std::uint16_t>((plan.query_block + kFloatLanes) * keys);
    scratch.key_bias = area.take<T>(keys);
    scratch.logsumexp = area.take<T>(rows);
    scratch.delta = area.take<T>(rows);
    scratch.grad_query = plan.chunks == 1 ? area.take<T>(rows * plan.head_stride) : nullptr;
    return scratch;
  }

  /// logsumexp in the log2 domain and delta = rowsum(grad_out * out) - grad_logsumexp.
  void load_rows(const BackwardScratch<Policy>& scratch, std::int64_t batch, std::int64_t kv_head,
                 std::int64_t first_query) const {
    const AttentionShape& shape = params.shape;
    const T* logsumexp = static_cast<const T*>(params.logsumexp);
    const T* grad_logsumexp = static_cast<const T*>(params.grad_logsumexp);
    const ConstStridedView& out = params.out;
    const ConstStridedView& grad_out = params.grad_out;
    for (std::int64_t g = 0; g < group(); ++g) {
      const std::int64_t head = kv_head * group() + g;
      const std::int64_t slice = batch * shape.query_heads + head;
      const char* out_row =
          element_at(out.data, params.dtype, slice_offset(out, shape.batch_sizes, batch, head));
      const char* grad_row = element_at(grad_out.data, params.dtype,
                                        slice_offset(grad_out, shape.batch_sizes, batch, head));
      for (std::int64_t i = first_query; i < shape.q_len; ++i) {
        Vec<T> sum{};
        for (std::int64_t d = 0; d < shape.value_dim; d += kLanes) {
          const std::int64_t wanted = shape.value_dim - d;
          sum += load_elements<T>(
                     element_at(out_row, params.dtype, i * out.row_stride + d * out.col_stride),
                     params.dtype, out.col_stride, wanted) *
                 load_elements<T>(element_at(grad_row, params.dtype,
                                             i * grad_out.row_stride + d * grad_out.col_stride),
                                  params.dtype, grad_out.col_stride, wanted);
        }
        const T row_logsumexp = logsumexp[slice * shape.q_len + i];
        // A finite mask that leaves a row nothing but its lowest values: their logsumexp, rounded
        // to multiples of 8 and more, tells no weights apart. No gradient, as for -inf.
        const bool attends = !(row_logsumexp < kLowestLogsumexp);
        T delta = horizontal_sum<T>(sum);
        if (grad_logsumexp != nullptr && attends) delta -= grad_logsumexp[slice * shape.q_len + i];
        scratch.delta[g * shape.q_len + i] = delta;
        scratch.logsumexp[g * shape.q_len + i] =
            attends ? row_logsumexp * static_cast<T>(kLog2eDouble) : kInfinity<T>;
      }
    }
  }

  /// All products of one block of scores.
  void process(const BackwardScratch<Policy>& scratch, ScoreBlock<Policy>& block,
               const RightOperand<Policy>& key_rows, std::int64_t batch, std::int64_t kv_head,
               T* grad_query) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t head = kv_head * group() + block.head;
    const std::int64_t stride = plan.key_tile;
    const auto stage = [&](const ConstStridedView& view, std::int64_t columns, char* buffer) {
      return stage_rows<Policy>(element_at(view.data, params.dtype,
                                           slice_offset(view, shape.batch_sizes, batch, head) +
                                               block.first_query * view.row_stride),
                                params.dtype, view.row_stride, view.col_stride, block.queries,
                                columns, buffer, true, true);
    };
    const StagedRows<Policy> query = stage(params.query, shape.head_dim, scratch.query_rows);
    const StagedRows<Policy> grad_out =
        stage(params.grad_out, shape.value_dim, scratch.grad_out_rows);
    contract<Policy, false>(block.queries, block.vectors, depth_steps<Policy>(shape.head_dim),
                            query.over_columns, scratch.key_panel, stride, scratch.weight, stride);
    contract<Policy, false>(block.queries, block.vectors, depth_steps<Policy>(shape.value_dim),
                            grad_out.over_columns, scratch.value_panel, stride, scratch.grad_score,
                            stride);
    const bool masked = block.adds_mask || block.adds_key_bias || block.diagonal;
    const ScoreGradient<Policy> gradient{params, plan, dropout};
    if (dropout.active) {
      dropout_bits_of_keys(scratch.dropout_bits, stride, block.queries, block.keys,
                           block.first_query, block.first_key, block.slice, dropout.seed);
      masked ? gradient.template weigh<true, true>(scratch, block)
             : gradient.template weigh<false, true>(scratch, block);
    } else {
      masked ? gradient.template weigh<true, false>(scratch, block)
             : gradient.template weigh<false, false>(scratch, block);
    }
    if (block.mask_sum != nullptr) mask_gradient.add(scratch, block);

    const Scalar* weight = reinterpret_cast<const Scalar*>(scratch.weight);
    const Scalar* grad_score = reinterpret_cast<const Scalar*>(scratch.grad_score);
    LeftOperand<Policy> grad_score_rows{grad_score, stride, 1};
    if constexpr (Policy::kDepth == 2) {
      weight = scratch.weight_pairs;
      grad_score = scratch.grad_score_pairs;
      grad_score_rows = {reinterpret_cast<const Scalar*>(scratch.grad_score_rows), stride / 2, 1};
    }
    const std::int64_t query_steps = depth_steps<Policy>(block.queries);
    if (params.grad_value.data != nullptr) {
      contract<Policy, true>(shape.value_dim, block.vectors, query_steps, grad_out.over_rows,
                             weight, stride, scratch.grad_value, stride);
    }
    if (params.grad_key.data != nullptr) {
      contract<Policy, true>(shape.head_dim, block.vectors, query_steps, query.over_rows,
                             grad_score, stride, scratch.grad_key, stride);
    }
    if (params.grad_query.data != nullptr) {
      contract<Policy, true>(
          block.queries, plan.head_stride / kLanes, depth_steps<Policy>(block.keys),
          grad_score_rows, key_rows.data, key_rows.stride,
          grad_query + (block.head * shape.q_len + block.first_query) * plan.head_stride,
          plan.head_stride);
    }
  }

  /// Keys [first, first + count) of one (batch, kv_head) against every query that may see them.
  void run_key_tile(const BackwardScratch<Policy>& scratch, std::int64_t batch,
                    std::int64_t kv_head, std::int64_t first, std::int64_t count, T* grad_query,
                    T* mask_sums) const {
    const AttentionShape& shape = params.shape;
    const AttentionMasking& masking = params.masking;
    const std::int64_t vectors = (count + kLanes - 1) / kLanes;
    const std::int64_t stride = plan.key_tile;
    const std::int64_t key_base =
        slice_offset(params.key, shape.batch_sizes, batch, kv_head) + first * params.key.row_stride;
    const std::int64_t value_base = slice_offset(params.value, shape.batch_sizes, batch, kv_head) +
                                    first * params.value.row_stride;
    const TileClass padding = load_key_bias(scratch.key_bias, batch, first, count);
    if (params.grad_key.data != nullptr) clear(scratch.grad_key, shape.head_dim * stride);
    if (params.grad_value.data != nullptr) clear(scratch.grad_value, shape.value_dim * stride);

    bool packed = false;
    RightOperand<Policy> key_rows{};
    const std::int64_t map_slice =
        plan.mask_map.used ? mask_map_slice(plan.mask_map, shape, batch, kv_head) : 0;
    const std::int64_t first_allowed =
        masking.is_causal ? max_of(first - masking.causal_offset, 0) : 0;
    for (std::int64_t g = 0; g < group() && padding != TileClass::kEmpty; ++g) {
      const std::int64_t head = kv_head * group() + g;
      for (std::int64_t start = first_allowed / plan.query_block * plan.query_block;
           start < shape.q_len; start += plan.query_block) {
        ScoreBlock<Policy> block{};
        block.head = g;
        block.first_query = max_of(start, first_allowed);
        const std::int64_t end = min_of(start + plan.query_block, shape.q_len);
        block.queries = end - block.first_query;
        if (block.queries <= 0) continue;
        const TileClass mask = mask_class(map_slice, start / plan.query_block, first);
        if (mask == TileClass::kEmpty) continue;
        block.first_key = first;
        block.keys = count;
        if (masking.is_causal) {
          block.keys = min_of(count, end - 1 + masking.causal_offset - first + 1);
        }
        block.vectors = (block.keys + kLanes - 1) / kLanes;
        block.diagonal = masking.is_causal && first + block.vectors * kLanes - 1 >
                                                  block.first_query + masking.causal_offset;
        block.adds_mask = masking.kind == AttentionMaskKind::kAdditive || mask == TileClass::kMixed;
        block.adds_key_bias = padding == TileClass::kMixed || block.vectors * kLanes > count;
        block.slice = static_cast<std::uint32_t>(batch * shape.query_heads + head);
        if (block.adds_mask) {
          block.mask_row = element_at(
              masking.mask.data,
              masking.kind == AttentionMaskKind::kAdditive ? masking.mask_dtype : ScalarType::kBool,
              slice_offset(masking.mask, shape.batch_sizes, batch, head) +
                  block.first_query * masking.mask.row_stride);
        }
        if (mask_sums != nullptr) {
          block.mask_sum = mask_sums +
                           (plan.mask_heads == 1 ? 0 : g) * plan.mask_rows * plan.mask_cols +
                           (plan.mask_rows == 1 ? 0 : block.first_query * plan.mask_cols);
        }
        if (!packed) {
          pack_tile(params.key, key_base, shape.head_dim, count, vectors, scratch.key_panel);
          pack_tile(params.value, value_base, shape.value_dim, count, vectors, scratch.value_panel);
          key_rows = stage_right<Policy>(element_at(params.key.data, params.dtype, key_base),
                                         params.dtype, params.key.row_stride, params.key.col_stride,
                                         count, shape.head_dim, scratch.key_rows);
          packed = true;
        }
        process(scratch, block, key_rows, batch, kv_head, grad_query);
      }
    }
    write_tile(params.grad_key, scratch.grad_key, shape.head_dim, batch, kv_head, first, count,
               static_cast<T>(params.scale));
    write_tile(params.grad_value, scratch.grad_value, shape.value_dim, batch, kv_head, first, count,
               static_cast<T>(dropout.scale));
  }

  /// Key padding and the end of the keys as a bias, a whole tile long.
  TileClass load_key_bias(T* bias, std::int64_t batch, std::int64_t first,
                          std::int64_t count) const {
    const ConstStridedView& padding = params.masking.key_padding;
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

  TileClass mask_class(std::int64_t map_slice, std::int64_t row_tile, std::int64_t key) const {
    const MaskMapPlan& map = plan.mask_map;
    if (!map.used) return TileClass::kFull;
    if (map.row_tiles == 1) row_tile = 0;
    return mask_map[(map_slice * map.row_tiles + row_tile) * map.column_tiles +
                    key / map.column_tile];
  }

  void pack_tile(const ConstStridedView& view, std::int64_t base, std::int64_t columns,
                 std::int64_t count, std::int64_t vectors, Scalar* panel) const {
    const std::int64_t row_stride = view.row_stride;
    for (std::int64_t j = 0; j < vectors; ++j) {
      const std::int64_t first = base + j * kLanes * row_stride;
      pack_lanes<Policy>(
          view.data, params.dtype, view.col_stride, count - j * kLanes, columns,
          [first, row_stride](int lane) { return first + lane * row_stride; }, static_cast<T>(1),
          panel + j * kLanes, plan.key_tile);
    }
  }

  void write_tile(const StridedView& view, const T* panel, std::int64_t columns, std::int64_t batch,
                  std::int64_t kv_head, std::int64_t first, std::int64_t count, T factor) const {
    if (view.data == nullptr) return;
    const std::int64_t row_stride = view.row_stride;
    const std::int64_t base = slice_offset(view, params.shape.batch_sizes, batch, kv_head);
    for (std::int64_t key = 0; key < count; key += kLanes) {
      const std::int64_t offset = base + (first + key) * row_stride;
      unpack_lanes<T>(
          panel + key, plan.key_tile, count - key, columns, broadcast(factor), view.data,
          gradient_type(params), view.col_stride,
          [offset, row_stride](std::int64_t lane) { return offset + lane * row_stride; });
    }
  }

  static void clear(T* data, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kLanes) store<T>(data + i, Vec<T>{});
  }

  // The first query that sees any key of a chunk.
  std::int64_t first_query_of(std::int64_t chunk) const {
    if (!params.masking.is_causal) return 0;
    return min_of(max_of(chunk * plan.chunk_len - params.masking.causal_offset, 0),
                  params.shape.q_len);
  }

  T* query_partial(std::int64_t chunk, std::int64_t pair) const {
    return reinterpret_cast<T*>(workspace + plan.query_partial_offset) +
           (chunk * plan.pairs + pair) * plan.rows_per_pair(params.shape) * plan.head_stride;
  }

  /// One (batch, kv_head) and one chunk of keys.
  void run_pair(int worker, std::int64_t pair, std::int64_t chunk, T* mask_sums) const {
    const AttentionShape& shape = params.shape;
    const BackwardScratch<Policy> scratch = scratch_of(worker);
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t kv_head = pair % shape.kv_heads;
    const std::int64_t first_query = first_query_of(chunk);
    load_rows(scratch, batch, kv_head, first_query);
    T* grad_query = nullptr;
    if (params.grad_query.data != nullptr) {
      grad_query = plan.chunks == 1 ? scratch.grad_query : query_partial(chunk, pair);
      for (std::int64_t g = 0; g < group(); ++g) {
        clear(grad_query + (g * shape.q_len + first_query) * plan.head_stride,
              (shape.q_len - first_query) * plan.head_stride);
      }
    }
    const std::int64_t end = min_of((chunk + 1) * plan.chunk_len, shape.kv_len);
    for (std::int64_t first = chunk * plan.chunk_len; first < end; first += plan.key_tile) {
      run_key_tile(scratch, batch, kv_head, first, min_of(plan.key_tile, end - first), grad_query,
                   mask_sums);
    }
    if (grad_query == nullptr || plan.chunks > 1) return;
    for (std::int64_t row = 0; row < plan.rows_per_pair(shape); ++row) {
      const T* source = grad_query + row * plan.head_stride;
      // Rows before the first that sees a key were not touched.
      const bool touched = row % shape.q_len >= first_query;
      write_grad_query(pair, row,
                       [&](std::int64_t d) { return touched ? load<T>(source + d) : Vec<T>{}; });
    }
  }

  /// sum(d): dQ / scale of kLanes columns from d on. row counts (group, q_len).
  template <typename Sum>
  void write_grad_query(std::int64_t pair, std::int64_t row, const Sum& sum) const {
    const AttentionShape& shape = params.shape;
    const StridedView& view = params.grad_query;
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t head = pair % shape.kv_heads * group() + row / shape.q_len;
    const std::int64_t offset =
        slice_offset(view, shape.batch_sizes, batch, head) + row % shape.q_len * view.row_stride;
    const ScalarType type = gradient_type(params);
    for (std::int64_t d = 0; d < shape.head_dim; d += kLanes) {
      store_elements<T>(element_at(view.data, type, offset + d * view.col_stride), type,
                        view.col_stride, shape.head_dim - d, sum(d) * static_cast<T>(params.scale));
    }
  }

  /// dQ of one row: the chunks' shares in their order.
  void join_query_row(std::int64_t pair, std::int64_t row) const {
    std::int64_t chunks = 0;
    while (chunks < plan.chunks && first_query_of(chunks) <= row % params.shape.q_len) ++chunks;
    write_grad_query(pair, row, [&](std::int64_t d) {
      Vec<T> sum{};
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += load<T>(query_partial(chunk, pair) + row * plan.head_stride + d);
      }
      return sum;
    });
  }

  /// A task: a chunk of keys for all pairs that share a partial of the mask's gradient, or one
  /// pair.
  void run_task(int worker, std::int64_t group_index, std::int64_t chunk) const {
    if (!plan.mask_gradient) return run_pair(worker, group_index, chunk, nullptr);
    const std::int64_t slice = group_index / plan.mask_partials;
    const std::int64_t partial = group_index % plan.mask_partials;
    T* sums = mask_gradient.start_partial(slice, partial, chunk);
    const std::int64_t begin = partial * plan.mask_shares / plan.mask_partials;
    const std::int64_t end = (partial + 1) * plan.mask_shares / plan.mask_partials;
    for (std::int64_t index = begin; index < end; ++index) {
      run_pair(worker, mask_sharing_pair(plan, params.shape, slice, index), chunk, sums);
    }
  }
};

/// Runs the plan: mask map, tasks (longest first where causal), then the joins.
template <typename Policy>
static void run_backward(const AttentionBackwardParams& params, const BackwardPlan& plan,
                         const TaskRunner& runner, char* workspace) {
  TileClass* map = reinterpret_cast<TileClass*>(workspace + plan.mask_map.offset);
  if (plan.mask_map.used) {
    build_mask_map(params.masking, params.shape, plan.mask_map, 1, runner, map);
  }
  const BackwardKernel<Policy> kernel{params, plan, map, workspace, dropout_state(params.dropout)};
  run_tasks(runner, plan.groups() * plan.chunks, [&kernel, &plan](int worker, std::int64_t task) {
    kernel.run_task(worker, task % plan.groups(), task / plan.groups());
  });
  if (plan.chunks > 1 && params.grad_query.data != nullptr) {
    const std::int64_t rows = plan.rows_per_pair(params.shape);
    run_tasks(runner, plan.pairs * rows, [&kernel, rows](int, std::int64_t task) {
      kernel.join_query_row(task / rows, task % rows);
    });
  }
  if (plan.mask_gradient) {
    run_tasks(runner, plan.mask_slices * plan.mask_heads * plan.mask_rows,
              [&kernel](int, std::int64_t task) { kernel.mask_gradient.join_row(task); });
  }
}
