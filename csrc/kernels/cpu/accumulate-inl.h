// accumulator = beta * accumulator + scale * grad over a list of tensors.

// A buffer that is only written and will not fit the caches: storing past them saves reading each
// line first, 4 of 12 bytes for fp32 into fp32. From here on, bytes of the whole list.
constexpr std::int64_t kStreamingBytes = 16 << 20;

/// A vector to an address aligned to the vector, past the caches.
template <typename T>
TORCH_EXT_INLINE void store_streaming(void* target, Vec<T> x) {
#if defined(TORCH_EXT_HAS_AVX512)
  _mm512_stream_ps(static_cast<float*>(target), (__m512)x);
#elif defined(TORCH_EXT_HAS_AVX2)
  _mm256_stream_ps(static_cast<float*>(target), (__m256)x);
#else
  *static_cast<Vec<T>*>(target) = x;
#endif
}

/// Streaming stores become visible before whatever the thread stores next.
TORCH_EXT_INLINE void fence_streaming() {
#if defined(TORCH_EXT_HAS_AVX2) || defined(TORCH_EXT_HAS_AVX512)
  _mm_sfence();
#endif
}

template <typename T, ScalarType kAccumulator, ScalarType kGrad, bool kOverwrite>
TORCH_EXT_INLINE Vec<T> accumulate_vector(const char* accumulator, const char* grad, T beta,
                                          T scale) {
  const Vec<T> addend = load_elements<T>(grad, kGrad) * scale;
  if constexpr (kOverwrite) return addend;
  return load_elements<T>(accumulator, kAccumulator) * beta + addend;
}

/// `count` < kLanes elements, by the same arithmetic.
template <typename T, bool kOverwrite>
static void accumulate_few(char* accumulator, ScalarType accumulator_type, const char* grad,
                           ScalarType grad_type, std::int64_t count, T beta, T scale) {
  if (count <= 0) return;
  Vec<T> sum = load_elements<T>(grad, grad_type, 1, count) * scale;
  if constexpr (!kOverwrite) {
    sum = load_elements<T>(accumulator, accumulator_type, 1, count) * beta + sum;
  }
  store_rounded<T>(accumulator, accumulator_type, 1, count, sum);
}

struct AccumulateScalars {
  double beta;
  double scale;
  bool streaming;
};

template <ScalarType kAccumulator, ScalarType kGrad, bool kOverwrite>
static void accumulate_dense(char* accumulator, const char* grad, std::int64_t count,
                             const AccumulateScalars& scalars) {
  constexpr bool kIsDouble = kAccumulator == ScalarType::kFloat64 || kGrad == ScalarType::kFloat64;
  using T = std::conditional_t<kIsDouble, double, float>;
  constexpr int kLanes = Simd<T>::kLanes;
  const std::int64_t accumulator_bytes = bytes_of(kAccumulator);
  const std::int64_t grad_bytes = bytes_of(kGrad);
  const T beta = static_cast<T>(scalars.beta);
  const T scale = static_cast<T>(scalars.scale);
  std::int64_t i = 0;
  if constexpr (kOverwrite && kAccumulator == kTypeOf<T>) {
    const std::int64_t misaligned = static_cast<std::int64_t>(
        reinterpret_cast<std::uintptr_t>(accumulator) % TORCH_EXT_VECTOR_BYTES);
    if (scalars.streaming && misaligned % accumulator_bytes == 0) {
      const std::int64_t head = min_of(
          count, misaligned == 0 ? 0 : (TORCH_EXT_VECTOR_BYTES - misaligned) / accumulator_bytes);
      accumulate_few<T, true>(accumulator, kAccumulator, grad, kGrad, head, beta, scale);
      for (i = head; i + kLanes <= count; i += kLanes) {
        store_streaming<T>(accumulator + i * accumulator_bytes,
                           load_elements<T>(grad + i * grad_bytes, kGrad) * scale);
      }
      fence_streaming();
    }
  }
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    Vec<T> sum[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sum[k] = accumulate_vector<T, kAccumulator, kGrad, kOverwrite>(
          accumulator + (i + k * kLanes) * accumulator_bytes, grad + (i + k * kLanes) * grad_bytes,
          beta, scale);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      store_rounded<T>(accumulator + (i + k * kLanes) * accumulator_bytes, kAccumulator, sum[k]);
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    store_rounded<T>(accumulator + i * accumulator_bytes, kAccumulator,
                     accumulate_vector<T, kAccumulator, kGrad, kOverwrite>(
                         accumulator + i * accumulator_bytes, grad + i * grad_bytes, beta, scale));
  }
  accumulate_few<T, kOverwrite>(accumulator + i * accumulator_bytes, kAccumulator,
                                grad + i * grad_bytes, kGrad, count - i, beta, scale);
}

template <ScalarType kElement>
struct TypeConstant {
  static constexpr ScalarType kType = kElement;
};

/// Calls `body` with the element type as a constant.
template <typename Body>
TORCH_EXT_INLINE void with_floating_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::kFloat32:
      return body(TypeConstant<ScalarType::kFloat32>{});
    case ScalarType::kFloat64:
      return body(TypeConstant<ScalarType::kFloat64>{});
    case ScalarType::kBFloat16:
      return body(TypeConstant<ScalarType::kBFloat16>{});
    case ScalarType::kFloat16:
      return body(TypeConstant<ScalarType::kFloat16>{});
    default:
      __builtin_unreachable();
  }
}

template <bool kOverwrite>
static void accumulate_elements(const AccumulateEntry& entry, std::int64_t first,
                                std::int64_t count, const AccumulateScalars& scalars) {
  with_floating_type(entry.accumulator.type, [&](auto accumulator_type) {
    with_floating_type(entry.grad.type, [&](auto grad_type) {
      constexpr ScalarType kAccumulator = decltype(accumulator_type)::kType;
      constexpr ScalarType kGrad = decltype(grad_type)::kType;
      accumulate_dense<kAccumulator, kGrad, kOverwrite>(
          element_at(entry.accumulator.data, kAccumulator, first),
          element_at(entry.grad.data, kGrad, first), count, scalars);
    });
  });
}

template <typename T>
static void accumulate_strips(const AccumulateEntry& entry, std::int64_t first, std::int64_t end,
                              const AccumulateScalars& scalars) {
  constexpr int kLanes = Simd<T>::kLanes;
  alignas(64) T sums[kStripElements];
  alignas(64) T addends[kStripElements];
  const T beta = static_cast<T>(scalars.beta);
  const T scale = static_cast<T>(scalars.scale);
  for (std::int64_t block = first; block < end; ++block) {
    const Strip strip = strip_at(entry.loop, block);
    const StripPlace target = strip_place(entry.loop, strip, 0);
    const StripPlace source = strip_place(entry.loop, strip, 1);
    const std::int64_t count = strip.rows * strip_pitch<T>(strip);
    gather_strip<T>(entry.grad.data, entry.grad.type, source, strip, addends);
    if (beta == 0) {
      for (std::int64_t i = 0; i < count; i += kLanes) {
        store<T>(sums + i, load<T>(addends + i) * scale);
      }
    } else {
      gather_strip<T>(entry.accumulator.data, entry.accumulator.type, target, strip, sums);
      for (std::int64_t i = 0; i < count; i += kLanes) {
        store<T>(sums + i, load<T>(sums + i) * beta + load<T>(addends + i) * scale);
      }
    }
    scatter_strip<T>(entry.accumulator.data, entry.accumulator.type, target, strip, sums);
  }
}

static void accumulate(const AccumulateParams& params, const TaskRunner& runner) {
  AccumulateScalars scalars{params.beta, scalar_operand(params.scale, 1.0), false};
  if (params.beta == 0.0) {
    std::int64_t bytes = 0;
    for (std::int64_t i = 0; i < params.num_entries; ++i) {
      bytes += params.entries[i].count * bytes_of(params.entries[i].accumulator.type);
    }
    scalars.streaming = bytes >= kStreamingBytes;
  }
  run_list(runner, params.entries, params.num_entries,
           [&](std::int64_t index, std::int64_t first, std::int64_t end) {
             const AccumulateEntry& entry = params.entries[index];
             if (entry.loop.dims != 0) {
               const bool is_double = entry.accumulator.type == ScalarType::kFloat64 ||
                                      entry.grad.type == ScalarType::kFloat64;
               return is_double ? accumulate_strips<double>(entry, first, end, scalars)
                                : accumulate_strips<float>(entry, first, end, scalars);
             }
             const std::int64_t begin = first * kListBlock;
             const std::int64_t count = min_of(entry.count, end * kListBlock) - begin;
             params.beta == 0.0 ? accumulate_elements<true>(entry, begin, count, scalars)
                                : accumulate_elements<false>(entry, begin, count, scalars);
           });
}
