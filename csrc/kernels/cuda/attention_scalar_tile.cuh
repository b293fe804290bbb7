// Products of tiles on the ordinary multiply-add units: exact fp32 and fp64, and 16-bit types with
// heads too wide for the tensor core tiles. A block of 16 x 16 threads works on 64 x 64 scores (32
// x 32 in fp64); thread (y, x) has rows y + 16 i and columns x + 16 j.
#pragma once

#include "device_attention.h"
#include "element_store.cuh"
#include "score_mask.cuh"

namespace torch_ext::cuda {

/// A matrix in global memory: rows of (batch, head).
struct RowSource {
  const void* data;
  std::int64_t start;
  std::int64_t row_stride;
  std::int64_t col_stride;

  template <typename Element, typename T, typename Block>
  TORCH_EXT_DEVICE T load(Block& block, std::int64_t row, std::int64_t col) const {
    return load_element<Element, T>(block, data, start + row * row_stride + col * col_stride);
  }
};

template <typename View>
TORCH_EXT_DEVICE RowSource row_source(const View& view, const DeviceShape& shape,
                                      std::int64_t batch, std::int64_t head) {
  return {view.data, slice_start(view, shape, batch, head), view.row_stride, view.col_stride};
}

template <typename Element, typename T>
struct ScalarTile {
  static constexpr int kThreads = 256;
  static constexpr int kSide = 16;  // threads along each edge
  static constexpr int kPerThread = sizeof(T) == 8 ? 2 : 4;
  static constexpr int kRows = kSide * kPerThread;  // and columns
  static constexpr int kDepth = 16;                 // of the products, staged at once
  static constexpr int kOutPerThread = 8;
  static constexpr int kOutCols = kSide * kOutPerThread;  // of head_dim or value_dim
  static constexpr int kPitch = kRows + 1;                // no two rows in the same bank
  // Shared memory: two operands (kDepth, kPitch), then two tiles (kRows, kPitch), then a stage
  // (kDepth, kOutCols).
  static constexpr std::uint32_t kLeft = 0;
  static constexpr std::uint32_t kRight = kLeft + kDepth * kPitch * sizeof(T);
  static constexpr std::uint32_t kWeights = kRight + kDepth * kPitch * sizeof(T);
  static constexpr std::uint32_t kGradScores = kWeights + kRows * kPitch * sizeof(T);
  static constexpr std::uint32_t kStage = kGradScores + kRows * kPitch * sizeof(T);
  static constexpr int kSharedBytes = static_cast<int>(kStage + kDepth * kOutCols * sizeof(T));

  using Scores = T[kPerThread][kPerThread];
  using Out = T[kPerThread][kOutPerThread];

  TORCH_EXT_DEVICE static int y_of(int thread) { return thread / kSide; }
  TORCH_EXT_DEVICE static int x_of(int thread) { return thread % kSide; }

  template <int kRowsHere, int kColsHere>
  TORCH_EXT_DEVICE static void clear(T (&values)[kRowsHere][kColsHere]) {
    TORCH_EXT_UNROLL
    for (int i = 0; i < kRowsHere; ++i) {
      TORCH_EXT_UNROLL
      for (int j = 0; j < kColsHere; ++j) values[i][j] = T{0};
    }
  }

  template <typename Block>
  TORCH_EXT_DEVICE static T load(Block& block, const RowSource& source, std::int64_t row,
                                 std::int64_t col) {
    return source.template load<Element, T>(block, row, col);
  }

  /// scores += left[rows] right[columns]^T over `depth` columns. Rows and columns beyond the counts
  /// are zeros.
  template <typename Block>
  TORCH_EXT_DEVICE static void multiply_rows(Block& block, Scores& scores, const RowSource& left,
                                             std::int64_t first_row, std::int64_t rows,
                                             const RowSource& right, std::int64_t first_col,
                                             std::int64_t cols, std::int64_t depth) {
    const int thread = block.thread();
    for (std::int64_t start = 0; start < depth; start += kDepth) {
      block.sync();
      for (int place = thread; place < kRows * kDepth; place += kThreads) {
        const int row = place / kDepth;
        const int d = place % kDepth;
        const bool inside = start + d < depth;
        block.template shared<T>(kLeft + (d * kPitch + row) * sizeof(T)) =
            inside && row < rows ? load(block, left, first_row + row, start + d) : T{0};
        block.template shared<T>(kRight + (d * kPitch + row) * sizeof(T)) =
            inside && row < cols ? load(block, right, first_col + row, start + d) : T{0};
      }
      block.sync();
      TORCH_EXT_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        T a[kPerThread];
        T b[kPerThread];
        TORCH_EXT_UNROLL
        for (int i = 0; i < kPerThread; ++i) {
          a[i] =
              block.template shared<T>(kLeft + (d * kPitch + y_of(thread) + kSide * i) * sizeof(T));
          b[i] = block.template shared<T>(kRight +
                                          (d * kPitch + x_of(thread) + kSide * i) * sizeof(T));
        }
        TORCH_EXT_UNROLL
        for (int i = 0; i < kPerThread; ++i) {
          TORCH_EXT_UNROLL
          for (int j = 0; j < kPerThread; ++j) scores[i][j] += a[i] * b[j];
        }
      }
    }
  }

  /// Leaves scores in the tile at `target`, for multiply_tile(). The caller's barrier comes first,
  /// so that nobody reads what was there.
  template <typename Block>
  TORCH_EXT_DEVICE static void keep(Block& block, std::uint32_t target, const Scores& scores) {
    const int thread = block.thread();
    TORCH_EXT_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      TORCH_EXT_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        block.template shared<T>(
            target + ((y_of(thread) + kSide * i) * kPitch + x_of(thread) + kSide * j) * sizeof(T)) =
            scores[i][j];
      }
    }
  }

  /// out += tile right[:, first_out:], or the tile's transpose: kTransposed. `count` rows of right,
  /// from first_row on; columns beyond `cols` are zeros. Begins with a barrier. The tile's sum is
  /// made by itself: added to a long one product by product it would round a thousand times.
  template <bool kTransposed, typename Block>
  TORCH_EXT_DEVICE static void multiply_tile(Block& block, Out& out, std::uint32_t tile,
                                             const RowSource& right, std::int64_t first_row,
                                             std::int64_t count, std::int64_t first_out,
                                             std::int64_t cols) {
    const int thread = block.thread();
    Out sum;
    clear(sum);
    for (int start = 0; start < kRows; start += kDepth) {
      block.sync();
      for (int place = thread; place < kDepth * kOutCols; place += kThreads) {
        const int row = start + place / kOutCols;
        const std::int64_t col = first_out + place % kOutCols;
        block.template shared<T>(kStage + place * sizeof(T)) =
            row < count && col < cols ? load(block, right, first_row + row, col) : T{0};
      }
      block.sync();
      TORCH_EXT_UNROLL
      for (int d = 0; d < kDepth; ++d) {
        T a[kPerThread];
        TORCH_EXT_UNROLL
        for (int i = 0; i < kPerThread; ++i) {
          const int row = y_of(thread) + kSide * i;
          const int place = kTransposed ? (start + d) * kPitch + row : row * kPitch + start + d;
          a[i] = block.template shared<T>(tile + place * sizeof(T));
        }
        TORCH_EXT_UNROLL
        for (int j = 0; j < kOutPerThread; ++j) {
          const T b = block.template shared<T>(kStage + (d * kOutCols + x_of(thread) + kSide * j) *
                                                            sizeof(T));
          TORCH_EXT_UNROLL
          for (int i = 0; i < kPerThread; ++i) sum[i][j] += a[i] * b;
        }
      }
    }
    TORCH_EXT_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      TORCH_EXT_UNROLL
      for (int j = 0; j < kOutPerThread; ++j) out[i][j] += sum[i][j];
    }
  }

  /// Sum, or maximum, over the 16 threads that share rows.
  template <typename Block, typename Join>
  TORCH_EXT_DEVICE static T across_columns(Block& block, T value, Join join) {
    TORCH_EXT_UNROLL
    for (int lanes = 1; lanes < kSide; lanes *= 2) {
      value = join(value, block.shuffle_xor(value, lanes));
    }
    return value;
  }

  /// Writes out * factor to rows of a tensor; of T, where `unrounded`, not of Element.
  template <typename Block, typename View>
  TORCH_EXT_DEVICE static void store(Block& block, const Out& out, const View& view,
                                     std::int64_t start, std::int64_t first_row, std::int64_t rows,
                                     std::int64_t first_out, std::int64_t cols, T factor,
                                     bool unrounded = false) {
    const int thread = block.thread();
    TORCH_EXT_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int row = y_of(thread) + kSide * i;
      if (row >= rows) continue;
      TORCH_EXT_UNROLL
      for (int j = 0; j < kOutPerThread; ++j) {
        const std::int64_t col = first_out + x_of(thread) + kSide * j;
        if (col >= cols) continue;
        const std::int64_t offset =
            start + (first_row + row) * view.row_stride + col * view.col_stride;
        if (unrounded) {
          store_element<T>(block, view.data, offset, out[i][j] * factor);
        } else {
          store_element<Element>(block, view.data, offset, out[i][j] * factor);
        }
      }
    }
  }
};

/// The masked natural score of one pair, for every path that takes pairs one by one.
template <typename Element, typename T, typename Block>
TORCH_EXT_DEVICE T pair_score(Block& block, const DeviceMasking& masking, const DeviceShape& shape,
                              T product, T scale, std::int64_t row, std::int64_t key,
                              std::int64_t mask_start, std::int64_t padding_start) {
  if (row >= shape.q_len || key >= masking.key_end(row, shape.kv_len)) return -infinity<T>();
  T score = block.product(product, scale);
  if (masking.kind != AttentionMaskKind::kNone) {
    const std::int64_t offset =
        mask_start + row * masking.mask.row_stride + key * masking.mask.col_stride;
    with_mask_type<Element>(
        masking, [&](auto mask) { score = masked_score(block, masking, mask, score, offset); });
  }
  return padded_score(block, masking, score, padding_start + key * masking.padding.col_stride);
}

}  // namespace torch_ext::cuda
