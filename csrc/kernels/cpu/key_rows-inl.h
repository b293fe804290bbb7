// Where the rows of keys and values lie: in one piece, or in the pages of a cache.

/// Neighbouring keys and values, rows a stride apart.
struct RowPiece {
  const char* key;
  const char* value;
  std::int64_t first;  // key
  std::int64_t count;
};

/// The rows of one (batch, kv_head).
struct KeyRows {
  const AttentionForwardParams& params;
  std::int64_t key_base;  // of the head, in elements
  std::int64_t value_base;

  TORCH_EXT_INLINE KeyRows of(const AttentionForwardParams& params, std::int64_t batch,
                              std::int64_t kv_head) {
    const auto& sizes = params.shape.batch_sizes;
    return {params, slice_offset(params.key, sizes, batch, kv_head),
            slice_offset(params.value, sizes, batch, kv_head)};
  }

  /// The longest piece from key `first` on, at most `count` keys.
  RowPiece piece(std::int64_t first, std::int64_t count) const {
    const ScalarType type = key_type(params);
    const PagedRows& pages = params.pages;
    std::int64_t key = key_base;
    std::int64_t value = value_base;
    std::int64_t row = first;
    if (pages.table != nullptr) {
      const std::int64_t page = pages.table[(pages.first_row + first) / pages.page_size];
      row = (pages.first_row + first) % pages.page_size;
      count = min_of(count, pages.page_size - row);
      key += page * pages.key_page_stride;
      value += page * pages.value_page_stride;
    }
    return {element_at(params.key.data, type, key + row * params.key.row_stride),
            element_at(params.value.data, type, value + row * params.value.row_stride), first,
            count};
  }

  /// body(piece) of the keys [first, first + count), in their order.
  template <typename Body>
  void for_pieces(std::int64_t first, std::int64_t count, const Body& body) const {
    const std::int64_t end = first + count;
    while (first < end) {
      const RowPiece next = piece(first, end - first);
      body(next);
      first += next.count;
    }
  }
};

/// Whether stage_rows() takes elements of a type.
template <typename Policy>
constexpr bool is_staged_from(ScalarType type) {
  return Policy::kDepth == 1 || type == ScalarType::kBFloat16;
}

/// Rows that lie here and there, staged as one left operand. `buffer` as in stage_rows().
template <typename Policy>
struct GatheredRows {
  using Scalar = typename Policy::Scalar;

  char* buffer;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t filled = 0;

  std::int64_t padded() const { return staged_columns<Policy>(columns); }

  void add(const char* source, ScalarType type, const ConstStridedView& view, std::int64_t count) {
    if constexpr (Policy::kDepth == 1) {
      convert_rows<Scalar>(source, type, view.row_stride, view.col_stride, count, columns,
                           reinterpret_cast<Scalar*>(buffer) + filled * padded(), padded());
    } else {
      for (std::int64_t row = 0; row < count; ++row) {
        const char* from = element_at(source, type, row * view.row_stride);
        std::uint16_t* to = halves() + (filled + row) * half_columns();
        for (std::int64_t column = 0; column < half_columns(); column += kFloatLanes) {
          // Exact: no stored type has more bits than bf16.
          const FloatVector x =
              load_elements<float>(element_at(from, type, column * view.col_stride), type,
                                   view.col_stride, max_of(columns - column, 0));
          store_elements<float>(to + column, ScalarType::kBFloat16, 1, half_columns() - column, x);
        }
      }
    }
    filled += count;
  }

  LeftOperand<Policy> over_columns() const { return staged(true).over_columns; }
  LeftOperand<Policy> over_rows() const { return staged(false).over_rows; }

 private:
  // bf16 rows, an even number of columns, in the half of the buffer that row pairs leave free.
  std::int64_t half_columns() const { return round_up(columns, 2); }
  std::uint16_t* halves() const {
    return reinterpret_cast<std::uint16_t*>(buffer + (rows + 1) / 2 * padded() * 4);
  }

  StagedRows<Policy> staged(bool wants_columns) const {
    if constexpr (Policy::kDepth == 1) {
      const Scalar* data = reinterpret_cast<const Scalar*>(buffer);
      return {{data, padded(), 1}, {data, 1, padded()}};
    } else {
      return stage_rows<Policy>(halves(), ScalarType::kBFloat16, half_columns(), 1, rows,
                                half_columns(), buffer, wants_columns, !wants_columns);
    }
  }
};
