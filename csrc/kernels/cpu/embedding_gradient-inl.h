// weight_grad = beta * weight_grad + the rows of grad_output added to the rows that they name. The
// tokens come grouped by row, so each row of the weight is written once, by one worker, its tokens
// added in their order: no atomics, and the same sum for every number of threads.

constexpr std::int64_t kEmbeddingCols = 512;     // of a task: a repeated row is still shared out
constexpr std::int64_t kEmbeddingTokens = 64;    // of a task, or one row's
constexpr std::int64_t kEmbeddingChain = 256;    // tokens added up before they join the row's sum
constexpr std::int64_t kEmbeddingGapRows = 256;  // of a task over rows that no token names
constexpr std::int64_t kEmbeddingAhead = 2;

/// First index in the sorted array whose value is not below `value`.
TORCH_EXT_INLINE std::int64_t first_not_below(const std::int64_t* sorted, std::int64_t count,
                                              std::int64_t value) {
  std::int64_t low = 0;
  while (low < count) {
    const std::int64_t middle = low + (count - low) / 2;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

/// weight[row][first_col ...] = beta * itself + addend (null: nothing).
template <typename T>
static void store_embedding_row(const EmbeddingGradientParams& params, std::int64_t row,
                                std::int64_t first_col, std::int64_t cols, const T* addend,
                                T factor) {
  constexpr int kLanes = Simd<T>::kLanes;
  const Matrix& weight = params.weight_grad;
  const T beta = static_cast<T>(params.beta);
  for (std::int64_t col = 0; col < cols; col += kLanes) {
    const std::int64_t count = min_of(kLanes, cols - col);
    char* target = element_at(weight.data, weight.type,
                              row * weight.row_stride + (first_col + col) * weight.col_stride);
    Vec<T> sum = addend == nullptr ? Vec<T>{} : load<T>(addend + col) * factor;
    if (params.beta != 0.0) {
      sum = load_elements<T>(target, weight.type, weight.col_stride, count) * beta + sum;
    }
    store_rounded<T>(target, weight.type, weight.col_stride, count, sum);
  }
}

/// `cols` elements from (row, first_col), where they lie together.
template <typename AnyMatrix>
TORCH_EXT_INLINE void prefetch_columns(const AnyMatrix& matrix, std::int64_t row,
                                       std::int64_t first_col, std::int64_t cols) {
  if (matrix.col_stride != 1) return;
  const char* const begin = static_cast<const char*>(
      element_at(matrix.data, matrix.type, row * matrix.row_stride + first_col));
  for (std::int64_t byte = 0; byte < cols * bytes_of(matrix.type); byte += 64) {
    __builtin_prefetch(begin + byte, 0, 3);
  }
}

/// Rows lie anywhere: the memory's own guesses start anew in each, so they are asked for
/// kEmbeddingAhead rows and tokens early.
TORCH_EXT_INLINE void prefetch_embedding(const EmbeddingGradientParams& params, std::int64_t index,
                                         std::int64_t first_col, std::int64_t cols) {
  const std::int64_t row = index + kEmbeddingAhead;
  if (row < params.num_rows) {
    prefetch_columns(params.weight_grad, params.rows[row], first_col, cols);
  }
}

template <typename T>
static void add_embedding_tokens(const EmbeddingGradientParams& params, std::int64_t begin,
                                 std::int64_t end, std::int64_t first_col, std::int64_t cols,
                                 T* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  const ConstMatrix& grads = params.grad_output;
  const std::int64_t num_tokens = params.starts[params.num_rows];
  for (std::int64_t i = begin; i < end; ++i) {
    if (i + kEmbeddingAhead < num_tokens) {
      prefetch_columns(grads, params.positions[i + kEmbeddingAhead], first_col, cols);
    }
    const char* source =
        element_at(grads.data, grads.type,
                   params.positions[i] * grads.row_stride + first_col * grads.col_stride);
    for (std::int64_t col = 0; col < cols; col += kLanes) {
      const Vec<T> grad = load_elements<T>(element_at(source, grads.type, col * grads.col_stride),
                                           grads.type, grads.col_stride, cols - col);
      store<T>(sums + col, i == begin ? grad : load<T>(sums + col) + grad);
    }
  }
}

template <typename T>
static void embedding_row(const EmbeddingGradientParams& params, std::int64_t index,
                          std::int64_t first_col, std::int64_t cols) {
  constexpr int kLanes = Simd<T>::kLanes;
  alignas(64) T total[kEmbeddingCols];
  alignas(64) T sums[kEmbeddingCols];
  const std::int64_t begin = params.starts[index];
  const std::int64_t end = params.starts[index + 1];
  for (std::int64_t token = begin; token < end; token += kEmbeddingChain) {
    const std::int64_t chain_end = min_of(end, token + kEmbeddingChain);
    if (token == begin) {
      add_embedding_tokens<T>(params, token, chain_end, first_col, cols, total);
      continue;
    }
    add_embedding_tokens<T>(params, token, chain_end, first_col, cols, sums);
    for (std::int64_t col = 0; col < cols; col += kLanes) {
      store<T>(total + col, load<T>(total + col) + load<T>(sums + col));
    }
  }
  const T factor =
      params.scale_by_frequency ? static_cast<T>(1.0 / static_cast<double>(end - begin)) : T(1);
  store_embedding_row<T>(params, params.rows[index], first_col, cols, total, factor);
}

template <typename T>
static void run_embedding_gradient(const EmbeddingGradientParams& params,
                                   const TaskRunner& runner) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t num_tokens = params.num_rows == 0 ? 0 : params.starts[params.num_rows];
  const std::int64_t col_tasks = ceil_div(params.dim, kEmbeddingCols);
  const std::int64_t task_cols =
      col_tasks == 0 ? 0 : round_up(ceil_div(params.dim, col_tasks), Simd<T>::kLanes);
  const std::int64_t named_tasks = ceil_div(num_tokens, kEmbeddingTokens) * col_tasks;
  // Rows that no token names change too, unless beta = 1.
  const std::int64_t gap_tasks =
      params.beta == 1.0 ? 0 : ceil_div(params.num_embeddings, kEmbeddingGapRows);
  run_tasks(runner, named_tasks + gap_tasks, [&](int, std::int64_t task) {
    if (task >= named_tasks) {
      const std::int64_t begin = (task - named_tasks) * kEmbeddingGapRows;
      const std::int64_t end = min_of(begin + kEmbeddingGapRows, params.num_embeddings);
      std::int64_t next = first_not_below(params.rows, params.num_rows, begin);
      for (std::int64_t row = begin; row < end; ++row) {
        if (next < params.num_rows && params.rows[next] == row) {
          ++next;
          continue;
        }
        store_embedding_row<T>(params, row, 0, params.dim, nullptr, T(0));
      }
      return;
    }
    const std::int64_t first_col = task % col_tasks * task_cols;
    const std::int64_t cols = min_of(task_cols, params.dim - first_col);
    if (cols <= 0) return;
    const std::int64_t token = task / col_tasks * kEmbeddingTokens;
    // The rows whose first token lies in this task's share.
    std::int64_t index = first_not_below(params.starts, params.num_rows, token);
    for (; index < params.num_rows && params.starts[index] < token + kEmbeddingTokens; ++index) {
      prefetch_embedding(params, index, first_col, cols);
      embedding_row<T>(params, index, first_col, cols);
    }
  });
}

static void embedding_gradient(const EmbeddingGradientParams& params, const TaskRunner& runner) {
  const bool is_double = params.weight_grad.type == ScalarType::kFloat64 ||
                         params.grad_output.type == ScalarType::kFloat64;
  is_double ? run_embedding_gradient<double>(params, runner)
            : run_embedding_gradient<float>(params, runner);
}
