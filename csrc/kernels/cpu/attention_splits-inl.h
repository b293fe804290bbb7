// Keys split over several tasks (Dao et al., Flash-Decoding): each leaves its unnormalised result,
// and these are joined in their order, so that results do not depend on who ran them.

template <typename Policy>
struct KeySplits {
  using T = typename Policy::Compute;
  static constexpr int kLanes = Simd<T>::kLanes;

  const AttentionForwardParams& params;
  const ForwardPlan& plan;
  char* workspace;
  const DropoutState& dropout;
  const ScoreDomain<T>& domain;

  /// Leaves a split's unnormalised result for combine().
  void store(const QueryTile<Policy>& tile, T* partial) const {
    const std::int64_t width = params.shape.value_dim + 3;
    const int stride = tile.vectors * kLanes;
    for (std::int64_t lane = 0; lane < tile.count; ++lane) {
      T* row = partial + lane * width;
      for (std::int64_t d = 0; d < params.shape.value_dim; ++d) {
        row[d] = tile.started ? tile.out[d * stride + lane] : static_cast<T>(0);
      }
      row[width - 3] = tile.maximum[lane];
      row[width - 2] = tile.reference[lane];
      row[width - 1] = tile.sum[lane];
    }
  }

  T* partial_of(std::int64_t pair, std::int64_t split, std::int64_t row) const {
    const std::int64_t width = params.shape.value_dim + 3;
    return reinterpret_cast<T*>(workspace + plan.partial_offset) +
           ((pair * plan.kv_splits + split) * plan.rows + row) * width;
  }

  void join_unit(std::int64_t unit) const { combine_row(unit / plan.rows, unit % plan.rows); }

  /// Joins the splits of one row in their order.
  void combine_row(std::int64_t pair, std::int64_t row) const {
    const AttentionShape& shape = params.shape;
    const std::int64_t width = shape.value_dim + 3;
    const std::int64_t heads = params.shape.group();
    const std::int64_t batch = pair / shape.kv_heads;
    const std::int64_t head = pair % shape.kv_heads * heads + row % heads;
    const std::int64_t query = row / heads;
    T maximum = -kInfinity<T>;
    for (std::int64_t split = 0; split < plan.kv_splits; ++split) {
      const T candidate = partial_of(pair, split, row)[width - 3];
      maximum = candidate > maximum || candidate != candidate ? candidate : maximum;
    }
    const T reference = maximum == -kInfinity<T> ? static_cast<T>(0) : maximum;
    T sum = 0;
    T* joined = partial_of(pair, 0, row);
    for (std::int64_t split = 0; split < plan.kv_splits; ++split) {
      const T* partial = partial_of(pair, split, row);
      const T weight = exp2_product(
          vector_max(broadcast(domain.lowest), broadcast(partial[width - 2] - reference)),
          broadcast(domain.log2))[0];
      sum += weight * partial[width - 1];
      for (std::int64_t d = 0; d < shape.value_dim; ++d) {
        joined[d] = split == 0 ? weight * partial[d] : joined[d] + weight * partial[d];
      }
    }
    const RowTotal<T> total = row_total(domain, maximum, reference, sum, dropout.scale,
                                        sink_of<T>(params.transform, head));
    const std::int64_t offset =
        slice_offset(params.out, shape.batch_sizes, batch, head) + query * params.out.row_stride;
    for (std::int64_t d = 0; d < shape.value_dim; d += kLanes) {
      const std::int64_t count = min_of(shape.value_dim - d, kLanes);
      store_elements<T>(
          element_at(params.out.data, params.dtype, offset + d * params.out.col_stride),
          params.dtype, params.out.col_stride, count,
          load_elements<T>(joined + d, kNativeType<Policy>, 1, count) * total.inverse);
    }
    if (params.logsumexp != nullptr) {
      static_cast<T*>(
          params.logsumexp)[logsumexp_row(params, batch * shape.query_heads + head, query)] =
          total.logsumexp;
    }
  }
};
