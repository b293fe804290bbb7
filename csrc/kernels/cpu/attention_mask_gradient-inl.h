// The gradient of an additive mask: the sum of dS over whatever the mask broadcasts. Tasks add into
// partial sums of their own, which are joined in a fixed order.

template <typename Policy>
struct MaskGradient {
  using T = typename Policy::Compute;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionBackwardParams& params;
  const BackwardPlan& plan;
  char* workspace;

  T* partial_sums(std::int64_t slice, std::int64_t partial, std::int64_t chunk) const {
    const std::int64_t column_chunks = plan.mask_column_chunks();
    const std::int64_t index =
        (slice * plan.mask_partials + partial) * column_chunks + (column_chunks == 1 ? 0 : chunk);
    return reinterpret_cast<T*>(workspace + plan.mask_partial_offset) +
           index * plan.mask_heads * plan.mask_rows * plan.mask_cols;
  }

  /// Where a task sums the mask's gradient up, zeroed: its own columns, or all of its own partial.
  T* start_partial(std::int64_t slice, std::int64_t partial, std::int64_t chunk) const {
    T* sums = partial_sums(slice, partial, chunk);
    const bool own_columns = plan.mask_cols > 1;
    const std::int64_t begin = own_columns ? chunk * plan.chunk_len : 0;
    const std::int64_t end =
        own_columns ? min_of(begin + plan.chunk_len, plan.mask_cols) : plan.mask_cols;
    for (std::int64_t row = 0; row < plan.mask_heads * plan.mask_rows; ++row) {
      for (std::int64_t col = begin; col < end; ++col) {
        sums[row * plan.mask_cols + col] = static_cast<T>(0);
      }
    }
    return sums;
  }

  /// sum[query][key] += dS, along whatever dimensions the mask has.
  void add(const BackwardScratch<Policy>& scratch, const ScoreBlock<Policy>& block) const {
    if (plan.mask_rows == 1 && plan.mask_cols > 1) return add_to_row(scratch, block);
    for (std::int64_t i = 0; i < block.queries; ++i) {
      const T* grad_score = scratch.mask_score + i * plan.key_tile;
      T* sum = block.mask_sum + (plan.mask_rows == 1 ? 0 : i * plan.mask_cols);
      if (plan.mask_cols == 1) {
        Vec<T> total{};
        for (std::int64_t key = 0; key < block.keys; key += kLanes) {
          total += load_elements<T>(grad_score + key, kNativeType<Policy>, 1, block.keys - key);
        }
        *sum += horizontal_sum<T>(total);
        continue;
      }
      for (std::int64_t key = 0; key < block.keys; key += kLanes) {
        const std::int64_t count = block.keys - key;
        T* target = sum + block.first_key + key;
        store_elements<T>(
            target, kNativeType<Policy>, 1, count,
            load_elements<T>(target, kNativeType<Policy>, 1, count) + load<T>(grad_score + key));
      }
    }
  }

  /// The same of a mask that all queries share: the block's sum by itself, then added.
  void add_to_row(const BackwardScratch<Policy>& scratch, const ScoreBlock<Policy>& block) const {
    for (std::int64_t key = 0; key < block.keys; key += kLanes) {
      Vec<T> total{};
      for (std::int64_t i = 0; i < block.queries; ++i) {
        total += load<T>(scratch.mask_score + i * plan.key_tile + key);
      }
      const std::int64_t count = block.keys - key;
      T* target = block.mask_sum + block.first_key + key;
      store_elements<T>(target, kNativeType<Policy>, 1, count,
                        load_elements<T>(target, kNativeType<Policy>, 1, count) + total);
    }
  }

  /// Of a slice's first head in grad_mask. Not by way of a pair: there is none where a dimension
  /// that the mask broadcasts over has size 0.
  std::int64_t slice_start(std::int64_t slice) const {
    const AttentionShape& shape = params.shape;
    const StridedView& view = params.grad_mask;
    std::int64_t offset = 0;
    if (plan.mask_head_varies) {
      offset += slice % shape.kv_heads * params.shape.group() * view.head_stride;
      slice /= shape.kv_heads;
    }
    for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
      if (!plan.mask_batch_varies[dim]) continue;
      offset += slice % shape.batch_sizes[dim] * view.batch_strides[dim];
      slice /= shape.batch_sizes[dim];
    }
    return offset;
  }

  /// One row of the mask's gradient: the partial sums in their order. row counts (slice, head,
  /// row).
  void join_row(std::int64_t index) const {
    const StridedView& view = params.grad_mask;
    const std::int64_t row = index % plan.mask_rows;
    const std::int64_t head = index / plan.mask_rows % plan.mask_heads;
    const std::int64_t slice = index / plan.mask_rows / plan.mask_heads;
    const std::int64_t offset =
        slice_start(slice) + head * view.head_stride + row * view.row_stride;
    const std::int64_t partials = plan.mask_partials * plan.mask_column_chunks();
    const std::int64_t partial_size = plan.mask_heads * plan.mask_rows * plan.mask_cols;
    const T* first = partial_sums(slice, 0, 0) + (head * plan.mask_rows + row) * plan.mask_cols;
    for (std::int64_t col = 0; col < plan.mask_cols; col += kLanes) {
      const std::int64_t count = plan.mask_cols - col;
      Vec<T> sum{};
      for (std::int64_t partial = 0; partial < partials; ++partial) {
        sum +=
            load_elements<T>(first + partial * partial_size + col, kNativeType<Policy>, 1, count);
      }
      store_elements<T>(element_at(view.data, kNativeType<Policy>, offset + col * view.col_stride),
                        kNativeType<Policy>, view.col_stride, count, sum);
    }
  }
};
