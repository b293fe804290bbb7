// weight_grad (out_features, in_features) = beta * weight_grad + grad_output^T input, accumulated
// in place: each tile of the weight is read once, gets all tokens and is written once. The same
// micro-kernel as attention's, over panels packed (and converted) by the worker that uses them:
//   left   grad_output, [strip of kTileRows out_features][tokens][kTileRows]
//   right  input, [group of kMaxVectors vectors of in_features][tokens][group]

template <typename Policy>
struct WeightTile {
  static constexpr int kRows = kTileRows<kMaxVectors>;
  static constexpr int kLanes = Simd<typename Policy::Compute>::kLanes;
  static constexpr int kCols = kMaxVectors * kLanes;
  /// Tokens of one packed panel: a right group of 24 columns is 24 KiB then.
  static constexpr std::int64_t kDepth = 256;
  /// Out_features of one task: a left panel of 128 KiB, a quarter of the second-level cache.
  static constexpr std::int64_t kTaskRows = 128;
  /// In_features of one task.
  static constexpr std::int64_t kTaskCols = 32 * kCols;
};

/// Words (scalars of the policy) of the panels and, for a destination that cannot be accumulated in
/// place, of the sums.
template <typename Policy>
struct WeightWorkspace {
  using Tile = WeightTile<Policy>;
  static constexpr std::int64_t kLeft = Tile::kTaskRows * Tile::kDepth / Policy::kDepth;
  static constexpr std::int64_t kRightBudget = 6144;  // scalars: 24 KiB, the first-level cache
  static constexpr std::int64_t kSums = Tile::kTaskRows * Tile::kTaskCols;
  static constexpr std::int64_t kEdge = Tile::kRows * Tile::kCols;
  using Scalar = typename Policy::Scalar;
  using Compute = typename Policy::Compute;

  Scalar* left;
  Scalar* right;
  Compute* sums;
  Compute* edge;
  double* bias;

  static constexpr std::int64_t kBytes =
      kLeft * static_cast<std::int64_t>(sizeof(Scalar)) +
      (kRightBudget + Tile::kCols * Tile::kDepth) * static_cast<std::int64_t>(sizeof(Scalar)) +
      (kSums + kEdge) * static_cast<std::int64_t>(sizeof(Compute)) + Tile::kTaskRows * 8 + 5 * 64;

  TORCH_EXT_INLINE WeightWorkspace at(char* memory) {
    ScratchArea scratch{memory};
    WeightWorkspace workspace;
    workspace.left = scratch.take<Scalar>(kLeft);
    workspace.right = scratch.take<Scalar>(kRightBudget + Tile::kCols * Tile::kDepth);
    workspace.sums = scratch.take<Compute>(kSums);
    workspace.edge = scratch.take<Compute>(kEdge);
    workspace.bias = scratch.take<double>(Tile::kTaskRows);
    return workspace;
  }
};

/// One contraction step of `count` <= kLanes columns as panel scalars, zeros beyond them: a row's
/// elements, or those of two rows in pairs. `second` is null beyond the last token.
template <typename Policy>
TORCH_EXT_INLINE Vec<typename Policy::Scalar> gather_step(const char* first, const char* second,
                                                          ScalarType type, std::int64_t col_stride,
                                                          std::int64_t count) {
  using Scalar = typename Policy::Scalar;
  constexpr int kLanes = Simd<Scalar>::kLanes;
  if constexpr (Policy::kDepth == 1) {
    static_cast<void>(second);
    return load_elements<Scalar>(first, type, col_stride, count);
  } else {
    Vec<Scalar> pairs{};
    for (int i = 0; i < min_of(kLanes, count); ++i) {
      const std::uint32_t high = second == nullptr ? 0u : bf16_at(second, i * col_stride);
      pairs[i] = bf16_at(first, i * col_stride) | high << 16;
    }
    return pairs;
  }
}

/// The same of kLanes columns that lie together.
template <typename Policy>
TORCH_EXT_INLINE Vec<typename Policy::Scalar> load_step(const char* first, const char* second,
                                                        ScalarType type) {
  using Scalar = typename Policy::Scalar;
  if constexpr (Policy::kDepth == 1) {
    static_cast<void>(second);
    return load_elements<Scalar>(first, type);
  } else {
    const Vec<Scalar> low = widen_uint16(first);
    return second == nullptr ? low : low | widen_uint16(second) << 16;
  }
}

/// panel[group][step][kWidth] of columns [0, columns) of `tokens` rows, zeros beyond the columns
/// and beyond the last token of a pair. A group is some vectors or an even part of one.
template <typename Policy, int kWidth>
static void pack_panel(const ConstMatrix& matrix, std::int64_t token, std::int64_t tokens,
                       std::int64_t column, std::int64_t columns, typename Policy::Scalar* panel) {
  using Scalar = typename Policy::Scalar;
  constexpr int kLanes = Simd<Scalar>::kLanes;
  constexpr int kPart = kWidth < kLanes ? kWidth : kLanes;  // of a vector, to one group
  const std::int64_t steps = depth_steps<Policy>(tokens);
  const std::int64_t row_bytes = matrix.row_stride * bytes_of(matrix.type);
  const char* const source =
      element_at(matrix.data, matrix.type, token * matrix.row_stride + column * matrix.col_stride);
  const auto store_vector = [&](std::int64_t col, std::int64_t step, Vec<Scalar> values) {
#pragma GCC unroll 4
    for (int part = 0; part < kLanes; part += kPart) {
      const std::int64_t first = col + part;
      if (part > 0 && first >= columns) return;  // no such group
      Scalar* const target =
          panel + (first / kWidth * steps + step) * kWidth + (kPart == kLanes ? first % kWidth : 0);
      __builtin_memcpy(target, reinterpret_cast<const Scalar*>(&values) + part,
                       kPart * sizeof(Scalar));
    }
  };
  // What is loaded whole; the rest, and matrices whose columns lie apart (a transposed linear's),
  // element by element.
  const std::int64_t whole = matrix.col_stride == 1 ? columns / kLanes * kLanes : 0;
  const std::int64_t padded = round_up(columns, kWidth > kLanes ? kWidth : kPart);
  for (std::int64_t step = 0; step < steps; ++step) {
    const char* const first = source + step * Policy::kDepth * row_bytes;
    const char* const second =
        Policy::kDepth == 2 && step * 2 + 1 < tokens ? first + row_bytes : nullptr;
    std::int64_t col = 0;
    for (; col < whole; col += kLanes) {
      const std::int64_t offset = col * bytes_of(matrix.type);
      store_vector(col, step,
                   load_step<Policy>(first + offset, second == nullptr ? second : second + offset,
                                     matrix.type));
    }
    for (; col < padded; col += kLanes) {
      const std::int64_t offset = col * matrix.col_stride * bytes_of(matrix.type);
      store_vector(col, step,
                   gather_step<Policy>(first + offset, second == nullptr ? second : second + offset,
                                       matrix.type, matrix.col_stride, max_of(0, columns - col)));
    }
  }
}

/// Rows [0, rows) of a strip against one right group of kVectors vectors, in place.
template <typename Policy, int kVectors, bool kAccumulate, int kRows>
TORCH_EXT_INLINE void contract_strip(std::int64_t rows, std::int64_t steps,
                                     const typename Policy::Scalar* left,
                                     const typename Policy::Scalar* right,
                                     typename Policy::Compute* out, std::int64_t out_stride) {
  constexpr int kStripWidth = WeightTile<Policy>::kRows;
  if (rows >= kRows) {
    contract_tile<Policy, kRows, kVectors, kAccumulate>(steps, {left, 1, kStripWidth}, right,
                                                        WeightTile<Policy>::kCols, out, out_stride);
    left += kRows;
    out += kRows * out_stride;
    rows -= kRows;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      contract_strip<Policy, kVectors, kAccumulate, kRows / 2>(rows, steps, left, right, out,
                                                               out_stride);
    }
  }
}

template <typename Policy, bool kAccumulate>
TORCH_EXT_INLINE void contract_group(std::int64_t rows, std::int64_t vectors, std::int64_t steps,
                                     const typename Policy::Scalar* left,
                                     const typename Policy::Scalar* right,
                                     typename Policy::Compute* out, std::int64_t out_stride) {
  constexpr int kRows = WeightTile<Policy>::kRows;
  if (vectors == kMaxVectors) {
    return contract_strip<Policy, kMaxVectors, kAccumulate, kRows>(rows, steps, left, right, out,
                                                                   out_stride);
  }
  if constexpr (kMaxVectors > 2) {
    if (vectors == 2) {
      return contract_strip<Policy, 2, kAccumulate, kRows>(rows, steps, left, right, out,
                                                           out_stride);
    }
  }
  contract_strip<Policy, 1, kAccumulate, kRows>(rows, steps, left, right, out, out_stride);
}

/// One panel of tokens into a block of sums: out[row][col] (+)=. Columns beyond the last whole
/// vector go through `edge`.
template <typename Policy, bool kAccumulate>
static void contract_block(std::int64_t rows, std::int64_t cols, std::int64_t steps,
                           const typename Policy::Scalar* left,
                           const typename Policy::Scalar* right, typename Policy::Compute* out,
                           std::int64_t out_stride, typename Policy::Compute* edge) {
  using Tile = WeightTile<Policy>;
  using Compute = typename Policy::Compute;
  constexpr int kLanes = Tile::kLanes;
  for (std::int64_t row = 0; row < rows; row += Tile::kRows) {
    const std::int64_t strip_rows = min_of(Tile::kRows, rows - row);
    Compute* const strip = out + row * out_stride;
    for (std::int64_t col = 0; col < cols; col += Tile::kCols) {
      const std::int64_t width = min_of(Tile::kCols, cols - col);
      const std::int64_t vectors = width / kLanes;
      const typename Policy::Scalar* group = right + col * steps;
      const typename Policy::Scalar* strip_left = left + row * steps;
      // The same tile of the next strip: its lines arrive while this strip is computed.
      if (row + Tile::kRows < rows) {
        for (int i = 0; i < Tile::kRows; ++i) {
          const char* line =
              reinterpret_cast<const char*>(strip + (Tile::kRows + i) * out_stride + col);
          __builtin_prefetch(line, 1, 3);
          __builtin_prefetch(line + 64, 1, 3);
        }
      }
      if (vectors > 0) {
        contract_group<Policy, kAccumulate>(strip_rows, vectors, steps, strip_left, group,
                                            strip + col, out_stride);
      }
      const std::int64_t rest = width - vectors * kLanes;
      if (rest > 0) {
        contract_group<Policy, false>(strip_rows, 1, steps, strip_left, group + vectors * kLanes,
                                      edge, kLanes);
        for (std::int64_t i = 0; i < strip_rows; ++i) {
          // Vectors need no alignment; elements by themselves would.
          Compute* const target = strip + i * out_stride + col + vectors * kLanes;
          alignas(64) Compute sums[kLanes] = {};
          const std::size_t bytes = static_cast<std::size_t>(rest) * sizeof(Compute);
          if constexpr (kAccumulate) __builtin_memcpy(sums, target, bytes);
          store<Compute>(sums, load<Compute>(sums) + load<Compute>(edge + i * kLanes));
          __builtin_memcpy(target, sums, bytes);
        }
      }
    }
  }
}

/// sums[row] of this panel's tokens, added to the workspace's doubles.
template <typename Policy>
static void add_bias_sums(const WeightGradientParams& params, std::int64_t token,
                          std::int64_t tokens, std::int64_t row, std::int64_t rows, double* sums) {
  using Compute = typename Policy::Compute;
  constexpr int kLanes = Simd<Compute>::kLanes;
  const ConstMatrix& grads = params.grad_output;
  for (std::int64_t i = 0; i < rows; i += kLanes) {
    const std::int64_t count = min_of(kLanes, rows - i);
    Vec<Compute> sum{};
    for (std::int64_t k = 0; k < tokens; ++k) {
      sum += load_elements<Compute>(
          element_at(grads.data, grads.type,
                     (token + k) * grads.row_stride + (row + i) * grads.col_stride),
          grads.type, grads.col_stride, count);
    }
    for (std::int64_t lane = 0; lane < count; ++lane) sums[i + lane] += sum[lane];
  }
}

TORCH_EXT_INLINE void store_bias(const WeightGradientParams& params, std::int64_t row,
                                 std::int64_t rows, const double* sums) {
  const Operand& bias = params.bias_grad;
  for (std::int64_t i = 0; i < rows; ++i) {
    void* target = element_at(bias.data, bias.type, (row + i) * params.bias_stride);
    double sum = sums[i];
    if (params.beta != 0.0) sum += params.beta * load_elements<double>(target, bias.type, 1, 1)[0];
    store_rounded<double>(target, bias.type, 1, 1, broadcast(sum));
  }
}

template <typename Policy>
static void weight_gradient_task(const WeightGradientParams& params, std::int64_t row,
                                 std::int64_t rows, std::int64_t col, std::int64_t cols,
                                 const WeightWorkspace<Policy>& workspace) {
  using Tile = WeightTile<Policy>;
  using Compute = typename Policy::Compute;
  const Matrix& weight = params.weight_grad;
  const bool in_place = weight.type == kNativeType<Policy> && weight.col_stride == 1 &&
                        (params.beta == 0.0 || params.beta == 1.0);
  Compute* const out = in_place ? reinterpret_cast<Compute*>(element_at(
                                      weight.data, weight.type, row * weight.row_stride + col))
                                : workspace.sums;
  const std::int64_t out_stride = in_place ? weight.row_stride : cols;
  const bool wants_bias = params.bias_grad.data != nullptr && col == 0;
  if (wants_bias) {
    for (std::int64_t i = 0; i < rows; ++i) workspace.bias[i] = 0.0;
  }
  bool accumulate = in_place && params.beta == 1.0;
  std::int64_t token = 0;
  do {
    const std::int64_t tokens = min_of(Tile::kDepth, params.tokens - token);
    const std::int64_t steps = depth_steps<Policy>(tokens);
    pack_panel<Policy, Tile::kRows>(params.grad_output, token, tokens, row, rows, workspace.left);
    if (wants_bias) {
      add_bias_sums<Policy>(params, token, tokens, row, rows, workspace.bias);
    }
    // As many groups at once as the first-level cache holds: the fewer tokens, the longer the rows
    // of the weight that are read and written in one go.
    const std::int64_t width =
        max_of(1, WeightWorkspace<Policy>::kRightBudget / max_of(1, steps * Tile::kCols)) *
        Tile::kCols;
    for (std::int64_t first = 0; first < cols; first += width) {
      const std::int64_t block_cols = min_of(width, cols - first);
      pack_panel<Policy, Tile::kCols>(params.input, token, tokens, col + first, block_cols,
                                      workspace.right);
      accumulate
          ? contract_block<Policy, true>(rows, block_cols, steps, workspace.left, workspace.right,
                                         out + first, out_stride, workspace.edge)
          : contract_block<Policy, false>(rows, block_cols, steps, workspace.left, workspace.right,
                                          out + first, out_stride, workspace.edge);
    }
    accumulate = true;
    token += tokens;
  } while (token < params.tokens);
  if (wants_bias) store_bias(params, row, rows, workspace.bias);
  if (in_place) return;
  constexpr int kLanes = Tile::kLanes;
  const Compute beta = static_cast<Compute>(params.beta);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < cols; j += kLanes) {
      const std::int64_t count = min_of(kLanes, cols - j);
      char* target = element_at(weight.data, weight.type,
                                (row + i) * weight.row_stride + (col + j) * weight.col_stride);
      Vec<Compute> sum =
          load_elements<Compute>(out + i * out_stride + j, kTypeOf<Compute>, 1, count);
      if (params.beta != 0.0) {
        sum = load_elements<Compute>(target, weight.type, weight.col_stride, count) * beta + sum;
      }
      store_rounded<Compute>(target, weight.type, weight.col_stride, count, sum);
    }
  }
}

template <typename Policy>
static void run_weight_gradient(const WeightGradientParams& params, const TaskRunner& runner,
                                char* workspace) {
  using Tile = WeightTile<Policy>;
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const int workers = runner.num_workers();
  // Halved until every worker has several tasks. Each element of the weight adds up its tokens in
  // the same order whatever the tasks are.
  std::int64_t task_rows = Tile::kTaskRows;
  std::int64_t task_cols = Tile::kTaskCols;
  const auto num_tasks = [&] {
    // Without in_features there is still a bias to sum.
    return ceil_div(params.out_features, task_rows) *
           max_of(1, ceil_div(params.in_features, task_cols));
  };
  const bool is_small = params.tokens * params.out_features * params.in_features < 1 << 18;
  while (!is_small && num_tasks() < 4 * workers && task_cols > 4 * Tile::kCols) task_cols /= 2;
  while (!is_small && num_tasks() < 2 * workers && task_rows > 4 * Tile::kRows) task_rows /= 2;
  const std::int64_t col_tasks = max_of(1, ceil_div(params.in_features, task_cols));
  run_tasks(runner, is_small ? 1 : num_tasks(), [&](int worker, std::int64_t task) {
    const auto panels =
        WeightWorkspace<Policy>::at(workspace + worker * WeightWorkspace<Policy>::kBytes);
    const std::int64_t end = is_small ? num_tasks() : task + 1;
    for (; task < end; ++task) {
      const std::int64_t row = task / col_tasks * task_rows;
      const std::int64_t col = task % col_tasks * task_cols;
      weight_gradient_task<Policy>(params, row, min_of(task_rows, params.out_features - row), col,
                                   min_of(task_cols, params.in_features - col), panels);
    }
  });
}

/// Calls `body` with the policy that the three matrices' types ask for.
template <typename Body>
TORCH_EXT_INLINE auto with_weight_policy(const WeightGradientParams& params, const Body& body) {
  const ScalarType grads = params.grad_output.type;
  const ScalarType inputs = params.input.type;
  if (grads == ScalarType::kFloat64 || inputs == ScalarType::kFloat64 ||
      params.weight_grad.type == ScalarType::kFloat64) {
    return body(DoubleContraction{});
  }
#if defined(TORCH_EXT_HAS_BF16_DOT)
  if (grads == ScalarType::kBFloat16 && inputs == ScalarType::kBFloat16) {
    return body(Bf16PairContraction{});
  }
#endif
  return body(FloatContraction{});
}

static std::size_t weight_gradient_workspace(const WeightGradientParams& params, int num_workers) {
  return with_weight_policy(params, [&](auto policy) {
    return static_cast<std::size_t>(WeightWorkspace<decltype(policy)>::kBytes) *
           static_cast<std::size_t>(num_workers);
  });
}

static void weight_gradient(const WeightGradientParams& params, const TaskRunner& runner,
                            void* workspace) {
  if (params.out_features == 0) return;
  with_weight_policy(params, [&](auto policy) {
    run_weight_gradient<decltype(policy)>(params, runner, static_cast<char*>(workspace));
  });
}
