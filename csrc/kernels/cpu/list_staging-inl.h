// Pieces of list entries as arrays of the compute type: read in place where the memory holds just
// that, through a small buffer in the first-level cache where it does not.

template <typename T>
constexpr ScalarType kTypeOf = sizeof(T) == 8 ? ScalarType::kFloat64 : ScalarType::kFloat32;

/// As store_elements(), for doubles of any destination too.
template <typename T>
TORCH_EXT_INLINE void store_rounded(void* target, ScalarType type, Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    if (type == ScalarType::kFloat64) {
      FloatHalfVector half[2];
      __builtin_memcpy(half, &x, sizeof half);
      store<double>(target, widen(half[0]));
      return store<double>(static_cast<double*>(target) + kDoubleLanes, widen(half[1]));
    }
    store_elements<float>(target, type, x);
  } else {
    if (type == ScalarType::kFloat64) return store<double>(target, x);
    const FloatHalfVector half = narrow(x);
    if (type == ScalarType::kFloat32) {
      __builtin_memcpy(target, &half, sizeof half);
      return;
    }
    FloatVector wide{};
    __builtin_memcpy(&wide, &half, sizeof half);
    char rounded[kFloatLanes * 4];
    store_elements<float>(rounded, type, wide);
    __builtin_memcpy(target, rounded, kDoubleLanes * 2);
  }
}

/// `count` <= kLanes elements with any stride. Writes nothing else.
template <typename T>
TORCH_EXT_INLINE void store_rounded(void* target, ScalarType type, std::int64_t stride,
                                    std::int64_t count, Vec<T> x) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (stride == 1 && count >= kLanes) return store_rounded<T>(target, type, x);
  alignas(64) char gathered[kLanes * 8];
  store_rounded<T>(gathered, type, x);
  const std::int64_t bytes = bytes_of(type);
  const std::int64_t wanted = min_of(count, kLanes);
  for (std::int64_t i = 0; i < wanted; ++i) {
    __builtin_memcpy(static_cast<char*>(target) + i * stride * bytes, gathered + i * bytes, bytes);
  }
}

/// values[i] = source[i] as T. Writes up to the next multiple of kLanes, zeros there.
template <typename T>
static void stage_in(const void* source, ScalarType type, std::int64_t count, T* values) {
  constexpr int kLanes = Simd<T>::kLanes;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store<T>(values + i, load_elements<T>(element_at(source, type, i), type));
  }
  if (i < count) {
    store<T>(values + i, load_elements<T>(element_at(source, type, i), type, 1, count - i));
  }
}

/// target[i] = values[i], rounded.
template <typename T>
static void stage_out(void* target, ScalarType type, std::int64_t count, const T* values) {
  constexpr int kLanes = Simd<T>::kLanes;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_rounded<T>(element_at(target, type, i), type, load<T>(values + i));
  }
  if (i < count) {
    Vec<T> tail{};
    __builtin_memcpy(&tail, values + i, static_cast<std::size_t>(count - i) * sizeof(T));
    store_rounded<T>(element_at(target, type, i), type, 1, count - i, tail);
  }
}

/// Row length of a strip's buffer.
template <typename T>
TORCH_EXT_INLINE std::int64_t strip_pitch(const Strip& strip) {
  return round_up(strip.cols, Simd<T>::kLanes);
}

constexpr std::int64_t kStripElements = kStripRows * kStripCols;

/// buffer[row][col], zeros up to the pitch. An operand that is contiguous along the rows (the
/// transposed weight) is read a cache line at a time and transposed in registers.
template <typename T>
static void gather_strip(const void* data, ScalarType type, const StripPlace& place,
                         const Strip& strip, T* buffer) {
  constexpr int kLanes = Simd<T>::kLanes;
  const std::int64_t pitch = strip_pitch<T>(strip);
  const char* source = element_at(data, type, place.offset);
  if (place.row_stride == 1 && place.col_stride != 1 && strip.rows >= kLanes) {
    for (std::int64_t row = 0; row < strip.rows; row += kLanes) {
      const std::int64_t rows = min_of(kLanes, strip.rows - row);
      for (std::int64_t col = 0; col < strip.cols; col += kLanes) {
        Vec<T> block[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          block[lane] = col + lane < strip.cols
                            ? load_elements<T>(
                                  element_at(source, type, (col + lane) * place.col_stride + row),
                                  type, 1, rows)
                            : Vec<T>{};
        }
        transpose<T>(block);
        for (std::int64_t k = 0; k < rows; ++k)
          store<T>(buffer + (row + k) * pitch + col, block[k]);
      }
    }
    return;
  }
  for (std::int64_t row = 0; row < strip.rows; ++row) {
    const char* line = element_at(source, type, row * place.row_stride);
    for (std::int64_t col = 0; col < strip.cols; col += kLanes) {
      store<T>(buffer + row * pitch + col,
               load_elements<T>(element_at(line, type, col * place.col_stride), type,
                                place.col_stride, strip.cols - col));
    }
  }
}

/// The reverse; rounds.
template <typename T>
static void scatter_strip(void* data, ScalarType type, const StripPlace& place, const Strip& strip,
                          const T* buffer) {
  constexpr int kLanes = Simd<T>::kLanes;
  const std::int64_t pitch = strip_pitch<T>(strip);
  char* target = element_at(data, type, place.offset);
  if (place.row_stride == 1 && place.col_stride != 1 && strip.rows >= kLanes) {
    for (std::int64_t row = 0; row < strip.rows; row += kLanes) {
      const std::int64_t rows = min_of(kLanes, strip.rows - row);
      for (std::int64_t col = 0; col < strip.cols; col += kLanes) {
        Vec<T> block[kLanes];
        for (int k = 0; k < kLanes; ++k) {
          block[k] = k < rows ? load<T>(buffer + (row + k) * pitch + col) : Vec<T>{};
        }
        transpose<T>(block);
        for (std::int64_t lane = 0; lane < min_of(kLanes, strip.cols - col); ++lane) {
          store_rounded<T>(element_at(target, type, (col + lane) * place.col_stride + row), type, 1,
                           rows, block[lane]);
        }
      }
    }
    return;
  }
  for (std::int64_t row = 0; row < strip.rows; ++row) {
    char* line = element_at(target, type, row * place.row_stride);
    for (std::int64_t col = 0; col < strip.cols; col += kLanes) {
      store_rounded<T>(element_at(line, type, col * place.col_stride), type, place.col_stride,
                       strip.cols - col, load<T>(buffer + row * pitch + col));
    }
  }
}

/// Starts the page and the prefetcher's stream of what comes next: hardware prefetchers stop at
/// page borders.
TORCH_EXT_INLINE void prefetch_ahead(const void* data) {
  const char* line = static_cast<const char*>(data);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_prefetch(line + 64 * i, 0, 3);
}

/// One element as a double; null: `otherwise`.
TORCH_EXT_INLINE double scalar_operand(const ConstOperand& operand, double otherwise) {
  if (operand.data == nullptr) return otherwise;
  return load_elements<double>(operand.data, operand.type, 1, 1)[0];
}
