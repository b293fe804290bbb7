// Getting operands into the shape the micro-kernel reads. fp32 (and fp64) rows are read where they
// lie; other dtypes are converted once per block; bf16 pairs are interleaved where the contraction
// runs over rows.

/// A block of rows as both kinds of left operand.
template <typename Policy>
struct StagedRows {
  LeftOperand<Policy> over_columns;  // A(row, column): contraction over the columns
  LeftOperand<Policy> over_rows;     // A(column, row): contraction over the rows
};

template <typename Policy>
constexpr ScalarType kNativeType = sizeof(typename Policy::Compute) == 8 ? ScalarType::kFloat64
                                                                         : ScalarType::kFloat32;

/// Row length of a staged block, in Compute elements.
template <typename Policy>
TORCH_EXT_INLINE std::int64_t staged_columns(std::int64_t columns) {
  return round_up(columns, Simd<typename Policy::Compute>::kLanes);
}

TORCH_EXT_INLINE std::uint16_t bf16_at(const void* data, std::int64_t offset) {
  std::uint16_t bits;
  __builtin_memcpy(&bits, static_cast<const char*>(data) + 2 * offset, 2);
  return bits;
}

#if defined(TORCH_EXT_HAS_BF16_DOT)
/// [row / 2][column] words holding (row, row + 1), zero beyond `rows` and `columns`.
TORCH_EXT_INLINE void interleave_row_pairs(const void* data, std::int64_t row_stride,
                                           std::int64_t col_stride, std::int64_t rows,
                                           std::int64_t columns, std::uint32_t* target,
                                           std::int64_t target_stride) {
  for (std::int64_t row = 0; row < rows; row += 2) {
    const bool has_second = row + 1 < rows;
    const char* first = static_cast<const char*>(data) + 2 * row * row_stride;
    const char* second = first + 2 * row_stride;
    std::uint32_t* words = target + row / 2 * target_stride;
    std::int64_t column = 0;
    if (col_stride == 1) {
      for (; column + kFloatLanes <= columns; column += kFloatLanes) {
        const Uint32Vector low = widen_uint16(first + 2 * column);
        const Uint32Vector high = has_second ? widen_uint16(second + 2 * column) : Uint32Vector{};
        store<std::uint32_t>(words + column, low | high << 16);
      }
    }
    for (; column < columns; ++column) {
      const std::uint32_t high = has_second ? bf16_at(second, column * col_stride) : 0u;
      words[column] = bf16_at(first, column * col_stride) | high << 16;
    }
    for (; column < target_stride; ++column) words[column] = 0;
  }
}

/// [row][column / 2] words holding (column, column + 1), zero beyond `columns`.
TORCH_EXT_INLINE void copy_column_pairs(const void* data, std::int64_t row_stride,
                                        std::int64_t col_stride, std::int64_t rows,
                                        std::int64_t columns, std::uint32_t* target,
                                        std::int64_t target_stride) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const char* source = static_cast<const char*>(data) + 2 * row * row_stride;
    for (std::int64_t column = 0; column < columns; column += 2) {
      const std::uint32_t high =
          column + 1 < columns ? bf16_at(source, (column + 1) * col_stride) : 0u;
      target[row * target_stride + column / 2] = bf16_at(source, column * col_stride) | high << 16;
    }
  }
}
#endif

/// Converted rows, padded with zeros to `target_stride` columns.
template <typename T>
TORCH_EXT_INLINE void convert_rows(const void* data, ScalarType type, std::int64_t row_stride,
                                   std::int64_t col_stride, std::int64_t rows, std::int64_t columns,
                                   T* target, std::int64_t target_stride) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (std::int64_t row = 0; row < rows; ++row) {
    const char* source = element_at(data, type, row * row_stride);
    for (std::int64_t column = 0; column < target_stride; column += kLanes) {
      store<T>(target + row * target_stride + column,
               load_elements<T>(element_at(source, type, column * col_stride), type, col_stride,
                                max_of(columns - column, 0)));
    }
  }
}

/// Stages rows (rows, columns) as left operands. `buffer` holds rows rounded up to even x
/// staged_columns() Compute elements, for bf16 pairs twice that; it is touched only where needed.
template <typename Policy>
TORCH_EXT_INLINE StagedRows<Policy> stage_rows(const void* data, ScalarType type,
                                               std::int64_t row_stride, std::int64_t col_stride,
                                               std::int64_t rows, std::int64_t columns,
                                               void* buffer, bool wants_columns, bool wants_rows) {
  using Scalar = typename Policy::Scalar;
  const std::int64_t padded = staged_columns<Policy>(columns);
  if constexpr (Policy::kDepth == 1) {
    (void)wants_columns;
    (void)wants_rows;
    const Scalar* source = static_cast<const Scalar*>(data);
    if (type != kNativeType<Policy>) {
      Scalar* target = static_cast<Scalar*>(buffer);
      convert_rows<Scalar>(data, type, row_stride, col_stride, rows, columns, target, padded);
      source = target;
      row_stride = padded;
      col_stride = 1;
    }
    return {{source, row_stride, col_stride}, {source, col_stride, row_stride}};
  } else {
#if defined(TORCH_EXT_HAS_BF16_DOT)
    Scalar* row_pairs = static_cast<Scalar*>(buffer);
    Scalar* column_pairs = row_pairs + (rows + 1) / 2 * padded;
    StagedRows<Policy> staged{};
    if (wants_rows) {
      interleave_row_pairs(data, row_stride, col_stride, rows, columns, row_pairs, padded);
      staged.over_rows = {row_pairs, 1, padded};
    }
    if (wants_columns) {
      if (col_stride == 1 && columns % 2 == 0 && row_stride % 2 == 0) {
        staged.over_columns = {static_cast<const Scalar*>(data), row_stride / 2, 1};
      } else {
        copy_column_pairs(data, row_stride, col_stride, rows, columns, column_pairs, padded / 2);
        staged.over_columns = {column_pairs, padded / 2, 1};
      }
    }
    return staged;
#endif
  }
}

/// Contraction steps over `length` elements.
template <typename Policy>
TORCH_EXT_INLINE std::int64_t depth_steps(std::int64_t length) {
  return (length + Policy::kDepth - 1) / Policy::kDepth;
}

/// Rows of vectors that the micro-kernel multiplies with: (steps, columns), columns padded with
/// zeros to whole vectors.
template <typename Policy>
struct RightOperand {
  const typename Policy::Scalar* data;
  std::int64_t stride;
};

/// Stages rows (rows, columns) as the right operand of a contraction over the rows. `buffer` as in
/// stage_rows().
template <typename Policy>
TORCH_EXT_INLINE RightOperand<Policy> stage_right(const void* data, ScalarType type,
                                                  std::int64_t row_stride, std::int64_t col_stride,
                                                  std::int64_t rows, std::int64_t columns,
                                                  void* buffer) {
  using Scalar = typename Policy::Scalar;
  const std::int64_t padded = staged_columns<Policy>(columns);
  if constexpr (Policy::kDepth == 1) {
    if (type == kNativeType<Policy> && col_stride == 1 && columns == padded) {
      return {static_cast<const Scalar*>(data), row_stride};
    }
    Scalar* target = static_cast<Scalar*>(buffer);
    convert_rows<Scalar>(data, type, row_stride, col_stride, rows, columns, target, padded);
    return {target, padded};
  } else {
    const StagedRows<Policy> staged =
        stage_rows<Policy>(data, type, row_stride, col_stride, rows, columns, buffer, false, true);
    return {staged.over_rows.data, staged.over_rows.depth_stride};
  }
}

/// Bytes that stage_rows() may touch in its buffer.
template <typename Policy>
TORCH_EXT_INLINE std::int64_t staged_rows_bytes(std::int64_t rows, std::int64_t columns) {
  const std::int64_t elements = round_up(rows, 2) * staged_columns<Policy>(columns);
  return round_up(elements * static_cast<std::int64_t>(sizeof(typename Policy::Compute)), 64);
}

/// Hands out pieces of a worker's private memory, one after the other; the schedule sizes it by the
/// same sum.
struct ScratchArea {
  char* next;
  template <typename Element>
  Element* take(std::int64_t count) {
    Element* result = reinterpret_cast<Element*>(next);
    next += round_up(count * static_cast<std::int64_t>(sizeof(Element)), 64);
    return result;
  }
};

/// One lane group of a transposed panel: panel[column / depth][lane] = row(lane)[column], or minus
/// that, for `count` rows at row_offset(lane), zero in the other lanes.
template <typename Policy, typename RowOffset>
TORCH_EXT_INLINE void pack_lanes(const void* data, ScalarType type, std::int64_t col_stride,
                                 std::int64_t count, std::int64_t columns, RowOffset row_offset,
                                 bool negate, typename Policy::Scalar* panel,
                                 std::int64_t panel_stride) {
  using Scalar = typename Policy::Scalar;
  constexpr int kLanes = Simd<Scalar>::kLanes;
  constexpr int kStep = kLanes * Policy::kDepth;
  for (std::int64_t column = 0; column < columns; column += kStep) {
    Vec<Scalar> block[kLanes];
    const std::int64_t wanted = min_of(columns - column, kStep);
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane >= count) {
        block[lane] = Vec<Scalar>{};
        continue;
      }
      const char* source = element_at(data, type, row_offset(lane) + column * col_stride);
      if constexpr (Policy::kDepth == 1) {
        block[lane] = load_elements<Scalar>(source, type, col_stride, wanted);
      } else if (col_stride == 1 && wanted == kStep) {
        block[lane] = load<Scalar>(source);
      } else {
        alignas(64) std::uint16_t pairs[kStep] = {};
        for (std::int64_t i = 0; i < wanted; ++i) pairs[i] = bf16_at(source, i * col_stride);
        block[lane] = load<Scalar>(pairs);
      }
    }
    transpose<Scalar>(block);
    const std::int64_t depth = (wanted + Policy::kDepth - 1) / Policy::kDepth;
    if (negate) {
      for (int k = 0; k < kLanes; ++k) {
        if constexpr (Policy::kDepth == 1) {
          block[k] = -block[k];
        } else {
          block[k] ^= 0x80008000u;
        }
      }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
      store<Scalar>(panel + (column / Policy::kDepth + k) * panel_stride, block[k]);
    }
  }
}

/// The reverse: row(lane)[column] = panel[column][lane] * factor(lane) for `count` lanes.
template <typename T, typename RowOffset>
TORCH_EXT_INLINE void unpack_lanes(const T* panel, std::int64_t panel_stride, std::int64_t count,
                                   std::int64_t columns, Vec<T> factor, void* data, ScalarType type,
                                   std::int64_t col_stride, RowOffset row_offset) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (std::int64_t column = 0; column < columns; column += kLanes) {
    Vec<T> block[kLanes];
    const std::int64_t wanted = min_of(columns - column, kLanes);
    for (int k = 0; k < kLanes; ++k) {
      block[k] = k < wanted ? load<T>(panel + (column + k) * panel_stride) * factor : Vec<T>{};
    }
    transpose<T>(block);
    for (std::int64_t lane = 0; lane < min_of(count, kLanes); ++lane) {
      store_elements<T>(element_at(data, type, row_offset(lane) + column * col_stride), type,
                        col_stride, wanted, block[lane]);
    }
  }
}
