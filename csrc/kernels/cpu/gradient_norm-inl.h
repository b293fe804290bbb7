// Norms of a list of tensors and whether they are finite, in one read. Squares are added in double,
// so that fp32 neither overflows nor loses small tensors beside large ones: first within a block,
// whose bounds are the shape's, then over the blocks in order. No sum depends on the thread count.

constexpr int kNormChains = 4;  // independent sums: two FMA ports x 4 cycles latency / 2 per vector

struct DoublePair {
  DoubleVector low;
  DoubleVector high;
};

template <ScalarType kType>
TORCH_EXT_INLINE DoublePair load_double_pair(const char* source) {
  if constexpr (kType == ScalarType::kFloat64) {
    return {load<double>(source), load<double>(source + TORCH_EXT_VECTOR_BYTES)};
  } else if constexpr (kType == ScalarType::kFloat32) {
    return {load_typed<double, kType>(source),
            load_typed<double, kType>(source + TORCH_EXT_VECTOR_BYTES / 2)};
  } else {
    const FloatVector wide = load_elements<float>(source, kType);
    FloatHalfVector half[2];
    __builtin_memcpy(half, &wide, sizeof half);
    return {__builtin_convertvector(half[0], DoubleVector),
            __builtin_convertvector(half[1], DoubleVector)};
  }
}

struct BlockNorm {
  double sum;
  bool finite;
};

// Squares of fp64 beyond 1e154 overflow: then once more with everything 2^-540 times as large. What
// vanishes by that is too small to show beside what did not fit.
constexpr double kDownscale = 0x1p-540;

/// Sum of x^2, or of (kDownscale * x)^2.
template <ScalarType kType, bool kDownscaled>
static BlockNorm sum_squares(const char* source, std::int64_t count) {
  constexpr int kLanes = 2 * kDoubleLanes;
  DoubleVector sums[2 * kNormChains] = {};
  // Of fp64 alone a finite element's square may be infinite: x * 0 is NaN where x is not finite.
  DoubleVector zeros{};
  const std::int64_t bytes = bytes_of(kType);
  const auto add = [&](DoublePair x, int chain) {
    if constexpr (kType == ScalarType::kFloat64) zeros += x.low * 0.0 + x.high * 0.0;
    if constexpr (kDownscaled) {
      x.low *= kDownscale;
      x.high *= kDownscale;
    }
    sums[2 * chain] += x.low * x.low;
    sums[2 * chain + 1] += x.high * x.high;
  };
  std::int64_t i = 0;
  for (; i + kNormChains * kLanes <= count; i += kNormChains * kLanes) {
    // One stream leaves the hardware's prefetcher short: 16 lines ahead.
    __builtin_prefetch(source + i * bytes + 1024, 0, 3);
    if constexpr (kNormChains * kLanes * 4 > 64 && kType != ScalarType::kBFloat16 &&
                  kType != ScalarType::kFloat16) {
      __builtin_prefetch(source + i * bytes + 1024 + 64, 0, 3);
    }
#pragma GCC unroll 4
    for (int chain = 0; chain < kNormChains; ++chain) {
      add(load_double_pair<kType>(source + (i + chain * kLanes) * bytes), chain);
    }
  }
  for (; i < count; i += kLanes) {
    alignas(64) char tail[kLanes * 8] = {};
    __builtin_memcpy(tail, source + i * bytes,
                     static_cast<std::size_t>(min_of(count - i, kLanes) * bytes));
    add(load_double_pair<kType>(tail), 0);
  }
  for (int half = kNormChains; half >= 1; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  const double sum = horizontal_sum<double>(sums[0]);
  const bool finite =
      kType == ScalarType::kFloat64 ? horizontal_sum<double>(zeros) == 0.0 : sum - sum == 0.0;
  return {sum, finite};
}

template <bool kDownscaled>
static BlockNorm sum_squares_of_block(const GradStatsEntry& entry, std::int64_t block) {
  BlockNorm result{0.0, true};
  if (entry.loop.dims == 0) {
    const std::int64_t begin = block * kListBlock;
    const std::int64_t count = min_of(kListBlock, entry.count - begin);
    with_floating_type(entry.grad.type, [&](auto type) {
      constexpr ScalarType kType = decltype(type)::kType;
      result = sum_squares<kType, kDownscaled>(element_at(entry.grad.data, kType, begin), count);
    });
    return result;
  }
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
  // Sum and finiteness of each block; each entry's first block, sum, exponent and finiteness.
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
             for (std::int64_t block = first; block < end; ++block) {
               norms[first_blocks[index] + block] =
                   sum_squares_of_block<kDownscaled>(params.entries[index], block);
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
