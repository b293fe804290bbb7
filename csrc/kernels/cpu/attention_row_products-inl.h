// Products of few rows with many: lanes run along the columns, and the rows on the right are read
// where they lie. The decoding kernel and the backward pass of as few rows make their scores here,
// of the same bits; sums in lanes are also nearer the truth than one chain over the columns.

struct LoadFloat {
  static constexpr ScalarType kType = ScalarType::kFloat32;
  TORCH_EXT_INLINE FloatVector at(const void* p) { return load<float>(p); }
};
struct LoadBf16 {
  static constexpr ScalarType kType = ScalarType::kBFloat16;
  TORCH_EXT_INLINE FloatVector at(const void* p) { return bf16_to_float(p); }
};
struct LoadFp16 {
  static constexpr ScalarType kType = ScalarType::kFloat16;
  TORCH_EXT_INLINE FloatVector at(const void* p) { return fp16_to_float(p); }
};

struct LoadInt8 {
  static constexpr ScalarType kType = ScalarType::kInt8;
  TORCH_EXT_INLINE FloatVector at(const void* p) { return int8_to_float(p); }
};
struct LoadFloat8 {
  static constexpr ScalarType kType = ScalarType::kFloat8E4M3;
  TORCH_EXT_INLINE FloatVector at(const void* p) { return float8_to_float(p); }
};

template <typename Loader>
constexpr std::int64_t kElementBytes = static_cast<std::int64_t>(element_size(Loader::kType));

/// Neighbouring rows of contiguous columns: keys or values.
struct RightRows {
  const char* data;
  std::int64_t row_bytes;
  std::int64_t count;
  std::int64_t columns;
  std::int64_t ahead = 0;  // rows of a later block to ask for meanwhile, in bytes from these
};

/// Asks for one row of a later block while its twin of this block is computed: sixteen short rows
/// abreast are more streams than the hardware follows (measured 25 of 36 GB/s in bf16).
TORCH_EXT_INLINE void prefetch_bytes(const char* row, std::int64_t bytes) {
  for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 3);
}

/// out[row][i] = left(row) . right(i) for i < width; from right.count on the last one's. left has
/// rows of `padded` floats, zero beyond the columns; out has rows of `stride`, and room for whole
/// vectors.
template <typename Loader, int kRows>
static __attribute__((noinline)) void row_products(const float* left, std::int64_t padded,
                                                   const RightRows& right, std::int64_t width,
                                                   float* out, std::int64_t stride) {
  constexpr int kLanes = kFloatLanes;
  constexpr int kKeys = kLanes >= kRows ? kLanes / kRows : 1;  // per step: kLanes sums
  constexpr std::int64_t kElement = kElementBytes<Loader>;
  const std::int64_t whole = right.columns / kLanes * kLanes;
  for (std::int64_t key = 0; key < width; key += kKeys) {
    const char* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      rows[i] = right.data + min_of(key + i, right.count - 1) * right.row_bytes;
    }
    FloatVector sum[kLanes] = {};
    for (std::int64_t d = 0; d < right.columns; d += kLanes) {
      FloatVector q[kRows];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) q[row] = load<float>(left + row * padded + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const FloatVector k = d < whole ? Loader::at(rows[i] + d * kElement)
                                        : load_elements<float>(rows[i] + d * kElement,
                                                               Loader::kType, 1, right.columns - d);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sum[row * kKeys + i] += q[row] * k;
      }
    }
    if (right.ahead != 0) {
      for (int i = 0; i < kKeys; ++i) {
        prefetch_bytes(rows[i] + right.ahead, right.columns * kElement);
      }
    }
    const FloatVector dots = reduce_rows<float>(sum);
    // Whole steps where there is room: of the rest, the next row's numbers may lie behind it.
    const std::int64_t bytes = (key + kKeys <= width ? kKeys : width - key) * 4;
    for (int row = 0; row < kRows; ++row) {
      float* const target = out + row * stride + key;
      const float* const source = reinterpret_cast<const float*>(&dots) + row * kKeys;
      if (bytes == kKeys * 4) {
        __builtin_memcpy(target, source, kKeys * 4);
      } else {
        __builtin_memcpy(target, source, bytes);
      }
    }
  }
}

/// The same of any number of rows: each one's sums do not depend on how many there are.
template <typename Loader>
TORCH_EXT_INLINE void row_products(std::int64_t rows, const float* left, std::int64_t padded,
                                   const RightRows& right, std::int64_t width, float* out,
                                   std::int64_t stride) {
  while (rows > 0) {
    const std::int64_t step = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    if (step == 4) {
      row_products<Loader, 4>(left, padded, right, width, out, stride);
    } else if (step == 2) {
      row_products<Loader, 2>(left, padded, right, width, out, stride);
    } else {
      row_products<Loader, 1>(left, padded, right, width, out, stride);
    }
    rows -= step;
    left += step * padded;
    out += step * stride;
  }
}

TORCH_EXT_INLINE void row_products(ScalarType type, std::int64_t rows, const float* left,
                                   std::int64_t padded, const RightRows& right, std::int64_t width,
                                   float* out, std::int64_t stride) {
  switch (type) {
    case ScalarType::kBFloat16:
      return row_products<LoadBf16>(rows, left, padded, right, width, out, stride);
    case ScalarType::kFloat16:
      return row_products<LoadFp16>(rows, left, padded, right, width, out, stride);
    default:
      return row_products<LoadFloat>(rows, left, padded, right, width, out, stride);
  }
}
