// weight_grad = beta * weight_grad + the rows of grad_output added to the rows that they name. The
// tokens come sorted by row. A warp adds up a block of 64 of them; what belongs to a row that the
// block has from its first token to its last is done, and the sums of a row that goes on into other
// blocks are put down and added in order by a second program: no atomics, and the same bits always.
#pragma once

#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"
#include "memory_vector.h"

namespace torch_ext::cuda {

inline constexpr int kEmbeddingTokens = 64;  // of a block
inline constexpr int kEmbeddingThreads = 256;
inline constexpr int kEmbeddingWidth = 4;  // columns of a thread
inline constexpr int kEmbeddingCols = kWarpSize * kEmbeddingWidth;

struct EmbeddingArgs {
  EmbeddingGradientParams gradient;
  std::int64_t tokens;
  const std::int64_t* sorted_rows;
  const std::int64_t* positions;
  std::int64_t padding_row;
  std::int64_t col_tiles;
  /// Sums of rows that go on: of the row that reaches into the block, and of the one that leaves
  /// it.
  void* partial_sums;  // (token blocks, 2, dim) of float or double
  bool vectors;        // grad_output's rows are read four columns at a time
};

constexpr std::int64_t embedding_token_blocks(std::int64_t tokens) {
  return (tokens + kEmbeddingTokens - 1) / kEmbeddingTokens;
}

/// First index in the sorted array whose value is not below `value`.
TORCH_EXT_DEVICE std::int64_t first_not_below(const std::int64_t* sorted, std::int64_t count,
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

/// What the programs share: a warp has a block of tokens, or a row, and a tile of columns.
template <typename T>
struct EmbeddingWarp {
  const EmbeddingArgs& args;
  std::int64_t unit;  // index of the block of tokens, or of the row
  std::int64_t first_col;
  int lane;

  TORCH_EXT_DEVICE EmbeddingWarp(const EmbeddingArgs& all, std::int64_t block, int thread)
      : args(all), lane(thread % kWarpSize) {
    const std::int64_t warp = (block * kEmbeddingThreads + thread) / kWarpSize;
    unit = warp / all.col_tiles;
    first_col = warp % all.col_tiles * kEmbeddingCols;
  }

  /// Column i of the thread. Neighbours where they are read as vectors, else a warp's width apart.
  TORCH_EXT_DEVICE std::int64_t col(int i) const {
    return first_col + (args.vectors ? lane * kEmbeddingWidth + i : lane + i * kWarpSize);
  }
  TORCH_EXT_DEVICE bool has(int i) const { return col(i) < args.gradient.dim; }

  TORCH_EXT_DEVICE void load_grad(std::int64_t token, T (&values)[kEmbeddingWidth]) const {
    const ConstMatrix& grads = args.gradient.grad_output;
    const std::int64_t row = token * grads.row_stride;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (args.vectors) {
        if (!has(0)) return;
        const void* const source = element_at(grads.data, row + col(0), bytes_of(grads.type));
        MemoryVector<kVectorBytes> bits;
        if (grads.type == ScalarType::kFloat32) {
          bits = load_vector_once<kVectorBytes>(source);
        } else {
          const MemoryVector<8> half = load_vector_once<8>(source);
          bits.words[0] = half.words[0];
          bits.words[1] = half.words[1];
        }
        widen(bits, grads.type, values);
        return;
      }
    }
    TORCH_EXT_UNROLL
    for (int i = 0; i < kEmbeddingWidth; ++i) {
      if (has(i))
        values[i] = load_scalar<T>(grads.data, row + col(i) * grads.col_stride, grads.type);
    }
  }

  TORCH_EXT_DEVICE T* partial_sum(std::int64_t token_block, int slot, int i) const {
    return static_cast<T*>(args.partial_sums) + (token_block * 2 + slot) * args.gradient.dim +
           col(i);
  }

  /// weight[row] = beta * weight[row] + sums (null: nothing).
  TORCH_EXT_DEVICE void store_row(std::int64_t row, const T* sums) const {
    const Matrix& weight = args.gradient.weight_grad;
    const T beta = static_cast<T>(args.gradient.beta);
    T factor = T(1);
    if (sums != nullptr && args.gradient.scale_by_frequency) {
      const std::int64_t first = first_not_below(args.sorted_rows, args.tokens, row);
      const std::int64_t end = first_not_below(args.sorted_rows, args.tokens, row + 1);
      factor = T(1) / static_cast<T>(end - first);
    }
    TORCH_EXT_UNROLL
    for (int i = 0; i < kEmbeddingWidth; ++i) {
      if (!has(i)) continue;
      const std::int64_t offset = row * weight.row_stride + col(i) * weight.col_stride;
      T sum = sums == nullptr ? T(0) : sums[i] * factor;
      if (beta != T(0)) sum += beta * load_scalar<T>(weight.data, offset, weight.type);
      store_scalar<T>(weight.data, offset, weight.type, sum);
    }
  }
};

/// Rows out of range end the kernel: the host cannot look without waiting for the device.
struct EmbeddingCheckProgram {
  static constexpr int kThreads = kEmbeddingThreads;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;
  using Args = EmbeddingArgs;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const std::int64_t i = block.index() * kThreads + block.thread();
    if (i >= args.tokens) return;
    const std::int64_t row = args.sorted_rows[i];
    if (row < 0 || row >= args.gradient.num_embeddings) {
      block.refuse_row(row, args.gradient.num_embeddings);
    }
  }
};

template <typename T>
struct EmbeddingSumProgram {
  static constexpr int kThreads = kEmbeddingThreads;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = sizeof(T) == sizeof(float) ? 3 : 2;
  /// Rows of grad_output on their way to a warp at once.
  static constexpr int kInFlight = 4;
  static_assert(kEmbeddingTokens % kInFlight == 0);
  using Args = EmbeddingArgs;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const EmbeddingWarp<T> warp(args, block.index(), block.thread());
    const std::int64_t first = warp.unit * kEmbeddingTokens;
    if (first >= args.tokens) return;
    const std::int64_t end = min_of(first + kEmbeddingTokens, args.tokens);
    const std::int64_t before = first == 0 ? -1 : args.sorted_rows[first - 1];
    const std::int64_t behind = end == args.tokens ? -1 : args.sorted_rows[end];
    std::int64_t row = args.sorted_rows[first];
    bool reaches_in = row == before;
    T sums[kEmbeddingWidth] = {};
    for (std::int64_t token = first; token < end; token += kInFlight) {
      T grads[kInFlight][kEmbeddingWidth] = {};
      std::int64_t rows[kInFlight];
      TORCH_EXT_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        rows[k] = -1;
        if (token + k >= end) continue;
        rows[k] = args.sorted_rows[token + k];
        if (rows[k] != args.padding_row) warp.load_grad(args.positions[token + k], grads[k]);
      }
      TORCH_EXT_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        if (token + k >= end) continue;
        if (rows[k] != row) {
          finish(warp, row, reaches_in, false, sums);
          row = rows[k];
          reaches_in = false;
          TORCH_EXT_UNROLL
          for (int i = 0; i < kEmbeddingWidth; ++i) sums[i] = T(0);
        }
        TORCH_EXT_UNROLL
        for (int i = 0; i < kEmbeddingWidth; ++i) sums[i] += grads[k][i];
      }
    }
    finish(warp, row, reaches_in, row == behind, sums);
  }

 private:
  TORCH_EXT_DEVICE static void finish(const EmbeddingWarp<T>& warp, std::int64_t row,
                                      bool reaches_in, bool goes_on,
                                      const T (&sums)[kEmbeddingWidth]) {
    if (row == warp.args.padding_row) return;
    if (!reaches_in && !goes_on) return warp.store_row(row, sums);
    TORCH_EXT_UNROLL
    for (int i = 0; i < kEmbeddingWidth; ++i) {
      if (warp.has(i)) *warp.partial_sum(warp.unit, reaches_in ? 0 : 1, i) = sums[i];
    }
  }
};

/// The rows that go on from one block of tokens into the next ones.
template <typename T>
struct EmbeddingJoinProgram {
  static constexpr int kThreads = kEmbeddingThreads;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 4;
  using Args = EmbeddingArgs;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const EmbeddingWarp<T> warp(args, block.index(), block.thread());
    const std::int64_t first = warp.unit * kEmbeddingTokens;
    const std::int64_t end = first + kEmbeddingTokens;
    if (end >= args.tokens) return;
    const std::int64_t row = args.sorted_rows[end];
    const std::int64_t last_row = args.sorted_rows[end - 1];
    const bool begins_here =
        args.sorted_rows[first] != row || first == 0 || args.sorted_rows[first - 1] != row;
    if (last_row != row || !begins_here || row == args.padding_row) return;
    T sums[kEmbeddingWidth] = {};
    add(warp, warp.unit, 1, sums);
    for (std::int64_t next = warp.unit + 1;
         next * kEmbeddingTokens < args.tokens && args.sorted_rows[next * kEmbeddingTokens] == row;
         ++next) {
      add(warp, next, 0, sums);
    }
    warp.store_row(row, sums);
  }

 private:
  TORCH_EXT_DEVICE static void add(const EmbeddingWarp<T>& warp, std::int64_t token_block, int slot,
                                   T (&sums)[kEmbeddingWidth]) {
    TORCH_EXT_UNROLL
    for (int i = 0; i < kEmbeddingWidth; ++i) {
      if (warp.has(i)) sums[i] += *warp.partial_sum(token_block, slot, i);
    }
  }
};

/// Rows that no token names change too, unless beta = 1.
template <typename T>
struct EmbeddingGapProgram {
  static constexpr int kThreads = kEmbeddingThreads;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 4;
  using Args = EmbeddingArgs;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const EmbeddingWarp<T> warp(args, block.index(), block.thread());
    const std::int64_t row = warp.unit;
    if (row >= args.gradient.num_embeddings) return;
    const std::int64_t token = first_not_below(args.sorted_rows, args.tokens, row);
    const bool is_named = token < args.tokens && args.sorted_rows[token] == row;
    if (is_named && row != args.padding_row) return;
    warp.store_row(row, nullptr);
  }
};

}  // namespace torch_ext::cuda
