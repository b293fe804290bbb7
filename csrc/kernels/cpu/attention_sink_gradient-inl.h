// The gradient of a head's sink: its weight in each row times that row's -delta, as for a key whose
// value is 0, summed over the queries in their order.

/// Units of the sum: (batch, query_heads), where it is wanted.
TORCH_EXT_INLINE std::int64_t sink_units(const AttentionBackwardParams& params) {
  return params.grad_sink == nullptr ? 0 : params.shape.batch() * params.shape.query_heads;
}

template <typename Kernel>
static void sum_sink_gradient(const Kernel& kernel, int worker, std::int64_t slice) {
  using T = typename Kernel::T;
  constexpr int kLanes = Kernel::kLanes;
  const AttentionBackwardParams& params = kernel.params;
  const AttentionShape& shape = params.shape;
  const auto scratch = kernel.scratch_of(worker);
  const std::int64_t batch = slice / shape.query_heads;
  const std::int64_t head = slice % shape.query_heads;
  const double sink = *sink_of<T>(params.transform, head);
  double sum = 0.0;
  for (std::int64_t first = 0; first < shape.q_len; first += kLanes) {
    const Vec<T> dots = kernel.row_dots(scratch, batch, head, first);
    for (std::int64_t lane = 0; lane < min_of(shape.q_len - first, kLanes); ++lane) {
      const std::int64_t query = first + lane;
      const auto weight = kernel.statistics.weight_of(slice, query);
      sum -= __builtin_exp(sink - weight.reference) * weight.factor *
             kernel.statistics.without_grad_logsumexp(dots[lane], slice, query);
    }
  }
  static_cast<T*>(params.grad_sink)[slice] = static_cast<T>(sum);
}
