// Norms of a list of tensors and whether they are finite, in one read. Squares are added in double,
// so that fp32 neither overflows nor loses small tensors beside large ones: first within a block,
// whose bounds are the shape's, then over the blocks in order. No sum depends on the thread count.

// How far ahead of its use a line is asked for. One stream a thread: several side by side read
// slower.
constexpr std::int64_t kNormAheadBytes = 6144;

struct DoublePair {
  DoubleVector low;
  DoubleVector high;
};

template <ScalarType kType>
TORCH_EXT_INLINE DoublePair load_double_pair(const char* source) {
  if constexpr (kType == ScalarType::kFloat64) {
    return {load<double>(source), load<double>(source + TORCH_EXT_VECTOR_BYTES)};
  } else {
    FloatHalfVector half[2];
    if constexpr (kType == ScalarType::kFloat32) {
      __builtin_memcpy(half, source, sizeof half);
    } else {
      const FloatVector wide = load_elements<float>(source, kType);
      __builtin_memcpy(half, &wide, sizeof half);
    }
    return {widen(half[0]), widen(half[1])};
  }
}

struct BlockNorm {
  double sum;
  bool finite;
};

// Squares of fp64 beyond 1e154 overflow: then once more with everything 2^-540 times as large. What
// vanishes by that is too small to show beside what did not fit.
constexpr double kDownscale = 0x1p-540;

/// Of a part of a block.
template <ScalarType kType, bool kDownscaled>
struct SquareSums {
  static constexpr int kElements = 2 * kDoubleLanes;  // of one step
  DoubleVector low{};
  DoubleVector high{};
  // Of fp64 alone a finite element's square may be infinite: x * 0 is NaN where x is not finite.
  DoubleVector zeros{};

  TORCH_EXT_INLINE void add(SquareSums& sums, const char* source) {
    DoublePair x = load_double_pair<kType>(source);
    if constexpr (kType == ScalarType::kFloat64) sums.zeros += x.low * 0.0 + x.high * 0.0;
    if constexpr (kDownscaled) {
      x.low *= kDownscale;
      x.high *= kDownscale;
    }
    sums.low += x.low * x.low;
    sums.high += x.high * x.high;
  }

  TORCH_EXT_INLINE void join(SquareSums& sums, const SquareSums& others) {
    sums.low += others.low;
    sums.high += others.high;
    sums.zeros += others.zeros;
  }

  TORCH_EXT_INLINE BlockNorm total(const SquareSums& sums) {
    const double sum = horizontal_sum<double>(sums.low + sums.high);
    const bool finite = kType == ScalarType::kFloat64 ? horizontal_sum<double>(sums.zeros) == 0.0
                                                      : sum - sum == 0.0;
    return {sum, finite};
  }
};

/// Sum of x^2, or of (kDownscale * x)^2, of `count` elements.
template <ScalarType kType, bool kDownscaled>
static BlockNorm sum_squares(const char* source, std::int64_t count) {
  using Sums = SquareSums<kType, kDownscaled>;
  const std::int64_t bytes = bytes_of(kType);
  // Two: with their halves as many additions are on their way as two ports x 4 cycles hold.
  Sums even;
  Sums odd;
  std::int64_t i = 0;
  for (; i + 2 * Sums::kElements <= count; i += 2 * Sums::kElements) {
    const char* const step = source + i * bytes;
    for (std::int64_t line = 0; line < 2 * Sums::kElements * bytes; line += 64) {
      __builtin_prefetch(step + line + kNormAheadBytes, 0, 3);
    }
    Sums::add(even, step);
    Sums::add(odd, step + Sums::kElements * bytes);
  }
  for (; i < count; i += Sums::kElements) {
    alignas(64) char tail[Sums::kElements * 8] = {};
    const std::int64_t rest = min_of(count - i, std::int64_t{Sums::kElements});
    __builtin_memcpy(tail, source + i * bytes, static_cast<std::size_t>(rest * bytes));
    Sums::add(even, tail);
  }
  Sums::join(even, odd);
  return Sums::total(even);
}

template <bool kDownscaled>
static BlockNorm sum_squares_of_block(const GradStatsEntry& entry, std::int64_t block) {
  BlockNorm result{0.0, true};
  with_floating_type(entry.grad.type, [&](auto type) {
    constexpr ScalarType kType = decltype(type)::kType;
    const std::int64_t begin = block * kListBlock;
    result = sum_squares<kType, kDownscaled>(element_at(entry.grad.data, kType, begin),
                                             min_of(kListBlock, entry.count - begin));
  });
  return result;
}

template <bool kDownscaled>
static BlockNorm sum_squares_of_strip(const GradStatsEntry& entry, std::int64_t block) {
  const Strip strip = strip_at(entry.loop, block);
  const StripPlace place = strip_place(entry.loop, strip, 0);
  if (entry.grad.type == ScalarType::kFloat64) {
    alignas(64) double values[kStripElements];
    gather_strip<double>(entry.grad.data, entry.grad.type, place, strip, values);
    return sum_squares<ScalarType::kFloat64, kDownscaled>(reinterpret_cast<const char*>(values),
                                                          strip.rows * strip_pitch<double>(strip));
  }
  alignas(64) float values[kStripElements];
  gather_strip<float>(entry.grad.data, entry.grad.type, place, strip, values);
  return sum_squares<ScalarType::kFloat32, kDownscaled>(reinterpret_cast<const char*>(values),
                                                        strip.rows * strip_pitch<float>(strip));
}

static std::size_t grad_stats_workspace(const GradStatsParams& params) {
  std::int64_t blocks = 0;
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    blocks += count_blocks(params.entries[i].count, params.entries[i].loop);
  }
  // Each block's sum and finiteness; each entry's first block, and one beyond the last.
  return static_cast<std::size_t>(blocks * static_cast<std::int64_t>(sizeof(BlockNorm)) +
                                  (params.num_entries + 1) * 8 + 64);
}

TORCH_EXT_INLINE void store_norm(void* target, ScalarType type, std::int64_t index, double value) {
  if (type == ScalarType::kFloat64) {
    static_cast<double*>(target)[index] = value;
  } else {
    static_cast<float*>(target)[index] = static_cast<float>(value);
  }
}

struct NormPass {
  double total;
  bool finite;
};

template <bool kDownscaled>
static NormPass norm_pass(const GradStatsParams& params, const TaskRunner& runner,
                          const std::int64_t* first_blocks, BlockNorm* norms) {
  run_list(runner, params.entries, params.num_entries,
           [&](std::int64_t index, std::int64_t first, std::int64_t end) {
             const GradStatsEntry& entry = params.entries[index];
             BlockNorm* const own = norms + first_blocks[index];
             const bool is_dense = entry.loop.dims == 0;
             for (std::int64_t block = first; block < end; ++block) {
               own[block] = is_dense ? sum_squares_of_block<kDownscaled>(entry, block)
                                     : sum_squares_of_strip<kDownscaled>(entry, block);
             }
           });
  constexpr double kUpscale = kDownscaled ? 1.0 / kDownscale : 1.0;
  NormPass pass{0.0, true};
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    double sum = 0.0;
    for (std::int64_t block = first_blocks[i]; block < first_blocks[i + 1]; ++block) {
      sum += norms[block].sum;
      pass.finite = pass.finite && norms[block].finite;
    }
    pass.total += sum;
    const double norm = __builtin_sqrt(sum) * kUpscale;
    // The second pass is for what overflowed in the first.
    if (!kDownscaled || norm > 1e153) store_norm(params.norms, params.norm_type, i, norm);
  }
  store_norm(params.norm, params.norm_type, 0, __builtin_sqrt(pass.total) * kUpscale);
  return pass;
}

static void grad_stats(const GradStatsParams& params, const TaskRunner& runner, void* workspace) {
  std::int64_t* const first_blocks = static_cast<std::int64_t*>(workspace);
  std::int64_t blocks = 0;
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    first_blocks[i] = blocks;
    blocks += count_blocks(params.entries[i].count, params.entries[i].loop);
  }
  first_blocks[params.num_entries] = blocks;
  BlockNorm* const norms = reinterpret_cast<BlockNorm*>(first_blocks + params.num_entries + 1);

  const NormPass pass = norm_pass<false>(params, runner, first_blocks, norms);
  if (pass.finite && pass.total > 1e308) norm_pass<true>(params, runner, first_blocks, norms);
  *params.found_inf = pass.finite ? 0.0f : 1.0f;
}
