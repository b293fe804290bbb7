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
  ScoreBlocks<Policy> blocks{params, plan, mask_map};
  RowStatistics<Policy> statistics{params, plan, blocks, workspace};

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
    scratch.mask_score =
        plan.caps_masked_scores ? area.take<T>(queries * keys) : scratch.grad_score;
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
    scratch.row_lanes = area.take<T>(2 * plan.query_block * kLanes);
    scratch.reference = area.take<T>(rows);
    scratch.factor = area.take<T>(rows);
    scratch.delta = area.take<T>(rows);
    scratch.grad_query = plan.chunks == 1 ? area.take<T>(rows * plan.head_stride) : nullptr;
    return scratch;
  }

  /// Each row's reference and factor, and delta = rowsum(grad_out * out) - grad_logsumexp.
  void load_rows(const BackwardScratch<Policy>& scratch, std::int64_t batch, std::int64_t kv_head,
                 Range queries) const {
    const AttentionShape& shape = params.shape;
    for (std::int64_t g = 0; g < group(); ++g) {
      const std::int64_t head = kv_head * group() + g;
      const std::int64_t slice = batch * shape.query_heads + head;
      T* delta = scratch.delta + g * shape.q_len;
      for (std::int64_t i = queries.begin; i < queries.end; i += kLanes) {
        const Vec<T> dots = row_dots(scratch, batch, head, i);
        for (std::int64_t lane = 0; lane < min_of(queries.end - i, kLanes); ++lane) {
          delta[i + lane] = dots[lane];
        }
      }
      for (std::int64_t i = queries.begin; i < queries.end; ++i) {
        const std::int64_t place = g * shape.q_len + i;
        const auto weight = statistics.weight_of(slice, i);
        delta[i] = statistics.without_grad_logsumexp(delta[i], slice, i);
        scratch.reference[place] = weight.reference;
        scratch.factor[place] = weight.factor;
      }
    }
  }

  /// grad_out(row) . out(row) of kLanes rows, lanes are rows: added up in the order of dP, so that
  /// the two cancel to the bit where one key takes it all.
  Vec<T> row_dots(const BackwardScratch<Policy>& scratch, std::int64_t batch, std::int64_t head,
                  std::int64_t first) const {
    const AttentionShape& shape = params.shape;
    if constexpr (sizeof(T) == 4) {
      if (plan.few_rows) return few_row_dots(scratch, batch, head, first);
    }
    if constexpr (Policy::kDepth == 1) {
      const bool whole = shape.q_len - first >= kLanes && shape.value_dim % kLanes == 0;
      if (whole && params.dtype == kNativeType<Policy> && params.out.col_stride == 1 &&
          params.grad_out.col_stride == 1) {
        return row_dots_in_registers(batch, head, first);
      }
    }
    Scalar* const out = scratch.value_panel;  // not yet in use
    Scalar* const grad_out = out + depth_steps<Policy>(shape.value_dim) * kLanes;
    const auto pack = [&](const ConstStridedView& view, Scalar* panel) {
      const std::int64_t stride = view.row_stride;
      const std::int64_t base = slice_offset(view, shape.batch_sizes, batch, head) + first * stride;
      pack_lanes<Policy>(
          view.data, params.dtype, view.col_stride, shape.q_len - first, shape.value_dim,
          [base, stride](int lane) { return base + lane * stride; }, false, panel, kLanes);
    };
    pack(params.out, out);
    pack(params.grad_out, grad_out);
    Vec<T> sum{};
    for (std::int64_t k = 0; k < depth_steps<Policy>(shape.value_dim); ++k) {
      Policy::step(sum, load<Scalar>(grad_out + k * kLanes), load<Scalar>(out + k * kLanes));
    }
    return sum;
  }

  Vec<T> few_row_dots(const BackwardScratch<Policy>& scratch, std::int64_t batch, std::int64_t head,
                      std::int64_t first) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t padded = round_up(shape.value_dim, kLanes);
    float* const out = reinterpret_cast<float*>(scratch.value_panel);  // not yet in use
    float* const grad_out = out + padded;
    const auto take = [&](const ConstStridedView& view, std::int64_t row, float* target) {
      const std::int64_t offset =
          slice_offset(view, shape.batch_sizes, batch, head) + row * view.row_stride;
      convert_rows<float>(element_at(view.data, params.dtype, offset), params.dtype, 0,
                          view.col_stride, 1, shape.value_dim, target, padded);
    };
    Vec<T> dots{};
    for (std::int64_t lane = 0; lane < min_of(shape.q_len - first, kLanes); ++lane) {
      take(params.out, first + lane, out);
      take(params.grad_out, first + lane, grad_out);
      const RightRows right{.data = reinterpret_cast<const char*>(out),
                            .row_bytes = 0,
                            .count = 1,
                            .columns = shape.value_dim};
      alignas(64) float dot[kLanes];
      row_products<LoadFloat, 1>(grad_out, padded, right, 1, dot, kLanes);
      dots[lane] = dot[0];
    }
    return dots;
  }

  /// The same sums without a panel in between, which took 6% of a backward pass over 128 keys.
  Vec<T> row_dots_in_registers(std::int64_t batch, std::int64_t head, std::int64_t first) const {
    const AttentionShape& shape = params.shape;
    const auto rows_of = [&](const ConstStridedView& view) {
      return static_cast<const T*>(view.data) + slice_offset(view, shape.batch_sizes, batch, head) +
             first * view.row_stride;
    };
    const T* const out_rows = rows_of(params.out);
    const T* const grad_rows = rows_of(params.grad_out);
    Vec<T> sum{};
    for (std::int64_t column = 0; column < shape.value_dim; column += kLanes) {
      Vec<T> out[kLanes];
      Vec<T> grad_out[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        out[lane] = load<T>(out_rows + lane * params.out.row_stride + column);
        grad_out[lane] = load<T>(grad_rows + lane * params.grad_out.row_stride + column);
      }
      transpose<T>(out);
      transpose<T>(grad_out);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) Policy::step(sum, grad_out[k], out[k]);
    }
    return sum;
  }

  /// All products of one block of scores.
  void process(const BackwardScratch<Policy>& scratch, ScoreBlock<Policy>& block,
               const RightOperand<Policy>& key_rows, std::int64_t batch, std::int64_t kv_head,
               T* grad_query) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t stride = plan.key_tile;
    const StagedRows<Policy> query =
        blocks.stage(params.query, batch, kv_head, block, shape.head_dim, scratch.query_rows, true);
    const StagedRows<Policy> grad_out = blocks.stage(params.grad_out, batch, kv_head, block,
                                                     shape.value_dim, scratch.grad_out_rows, true);
    blocks.multiply(params.query, query, params.key, shape.head_dim, scratch.key_panel, batch,
                    kv_head, block, scratch.weight);
    blocks.multiply(params.grad_out, grad_out, params.value, shape.value_dim, scratch.value_panel,
                    batch, kv_head, block, scratch.grad_score);
    const ScoreGradient<Policy> gradient{params, plan, dropout};
    if (dropout.active) {
      dropout_bits_of_keys(scratch.dropout_bits, stride, block.queries, block.keys,
                           block.first_query, block.first_key, block.slice, dropout.seed);
      block.modified ? gradient.template weigh<true, true>(scratch, block)
                     : gradient.template weigh<false, true>(scratch, block);
    } else {
      block.modified ? gradient.template weigh<true, false>(scratch, block)
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
                             weight, stride, scratch.grad_value + block.key_offset, stride);
    }
    if (params.grad_key.data != nullptr) {
      contract<Policy, true>(shape.head_dim, block.vectors, query_steps, query.over_rows,
                             grad_score, stride, scratch.grad_key + block.key_offset, stride);
    }
    if (params.grad_query.data != nullptr) {
      contract<Policy, true>(
          block.queries, plan.head_stride / kLanes, depth_steps<Policy>(block.keys),
          grad_score_rows, key_rows.data + block.key_offset / Policy::kDepth * key_rows.stride,
          key_rows.stride,
          grad_query + (block.head * shape.q_len + block.first_query) * plan.head_stride,
          plan.head_stride);
    }
  }

  /// Keys [first, first + count) of one (batch, kv_head) against every query that may see them.
  void run_key_tile(const BackwardScratch<Policy>& scratch, std::int64_t batch,
                    std::int64_t kv_head, std::int64_t first, std::int64_t count, T* grad_query,
                    T* mask_sums) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t stride = plan.key_tile;
    const std::int64_t key_base =
        slice_offset(params.key, shape.batch_sizes, batch, kv_head) + first * params.key.row_stride;
    const std::int64_t value_base = slice_offset(params.value, shape.batch_sizes, batch, kv_head) +
                                    first * params.value.row_stride;
    const TileClass padding = blocks.load_tile_bias(scratch.key_bias, batch, first, count);
    if (params.grad_key.data != nullptr) clear(scratch.grad_key, shape.head_dim * stride);
    if (params.grad_value.data != nullptr) clear(scratch.grad_value, shape.value_dim * stride);

    bool packed = false;
    RightOperand<Policy> key_rows{};
    const Range seeing = blocks.queries_of(first, count);
    for (std::int64_t g = 0; g < group() && padding != TileClass::kEmpty; ++g) {
      for (std::int64_t start = seeing.begin / plan.query_block * plan.query_block;
           start < seeing.end; start += plan.query_block) {
        ScoreBlock<Policy> block{};
        if (!blocks.locate(block, batch, kv_head, g, start, first, count, padding,
                           scratch.key_bias)) {
          continue;
        }
        if (mask_sums != nullptr) {
          block.mask_sum = mask_sums +
                           (plan.mask_heads == 1 ? 0 : g) * plan.mask_rows * plan.mask_cols +
                           (plan.mask_rows == 1 ? 0 : block.first_query * plan.mask_cols);
        }
        if (!packed) {
          blocks.pack_tile(params.key, key_base, shape.head_dim, count, scratch.key_panel);
          blocks.pack_tile(params.value, value_base, shape.value_dim, count, scratch.value_panel);
          key_rows = stage_right<Policy>(element_at(params.key.data, params.dtype, key_base),
                                         params.dtype, params.key.row_stride, params.key.col_stride,
                                         count, shape.head_dim, scratch.key_rows);
          packed = true;
        }
        process(scratch, block, key_rows, batch, kv_head, grad_query);
      }
    }
    write_tile(params.grad_key, scratch.grad_key, shape.head_dim, batch, kv_head, first, count,
               static_cast<T>(params.transform.scale));
    write_tile(params.grad_value, scratch.grad_value, shape.value_dim, batch, kv_head, first, count,
               static_cast<T>(dropout.scale));
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

  Range queries_of_chunk(std::int64_t chunk) const {
    const std::int64_t first = chunk * plan.chunk_len;
    return blocks.queries_of(first, min_of(plan.chunk_len, params.shape.kv_len - first));
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
    const Range queries = queries_of_chunk(chunk);
    load_rows(scratch, batch, kv_head, queries);
    T* grad_query = nullptr;
    if (params.grad_query.data != nullptr) {
      grad_query = plan.chunks == 1 ? scratch.grad_query : query_partial(chunk, pair);
      for (std::int64_t g = 0; g < group(); ++g) {
        clear(grad_query + (g * shape.q_len + queries.begin) * plan.head_stride,
              queries.size() * plan.head_stride);
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
      // Rows that see no key were not touched.
      const bool touched = queries.contains(row % shape.q_len);
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
                        view.col_stride, shape.head_dim - d,
                        sum(d) * static_cast<T>(params.transform.scale));
    }
  }

  /// dQ of one row: the chunks' shares in their order.
  void join_query_row(std::int64_t pair, std::int64_t row) const {
    write_grad_query(pair, row, [&](std::int64_t d) {
      Vec<T> sum{};
      for (std::int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        if (!queries_of_chunk(chunk).contains(row % params.shape.q_len)) continue;
        sum += load<T>(query_partial(chunk, pair) + row * plan.head_stride + d);
      }
      return sum;
    });
  }

  /// The units of each step, in their order: blocks of queries, tasks, rows of dQ.
  std::int64_t statistics_units() const {
    const AttentionShape& shape = params.shape;
    return statistics.any ? shape.batch() * shape.query_heads * query_blocks() : 0;
  }
  void run_statistics(int worker, std::int64_t unit) const {
    statistics.run(scratch_of(worker), unit / query_blocks(),
                   unit % query_blocks() * plan.query_block);
  }
  void run_unit(int worker, std::int64_t unit) const {
    run_task(worker, unit % plan.groups(), unit / plan.groups());
  }
  void join_unit(std::int64_t unit) const {
    const std::int64_t rows = plan.rows_per_pair(params.shape);
    join_query_row(unit / rows, unit % rows);
  }
  std::int64_t query_blocks() const {
    return (params.shape.q_len + plan.query_block - 1) / plan.query_block;
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
