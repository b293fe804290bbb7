// An optimizer's step over a list of tensors: normalise, clip, update, master weights and the reset
// of the accumulators in one pass. A block a chunk; Adam's step counts first, in a program of their
// own.
#pragma once

#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"
#include "memory_vector.h"
#include "optimizer_arithmetic.h"
#include "tensor_list.h"
#include "vector_span.h"

namespace torch_ext::cuda {

struct StepScalars {
  ConstOperand coefficient;
  ConstOperand found_inf;
  bool maximize;
  bool reset;

  TORCH_EXT_DEVICE bool is_skipped() const { return !(scalar_operand(found_inf, 0.0) == 0.0); }
  TORCH_EXT_DEVICE double signed_coefficient() const {
    const double value = scalar_operand(coefficient, 1.0);
    return maximize ? -value : value;
  }
};

/// Chunks of entries with the operands of `Arithmetic`: loads, one element's arithmetic, stores.
template <template <typename> class Arithmetic, typename List, int kThreads>
struct StepChunks {
  using Entry = typename List::Entry;
  static constexpr int kOperands = Arithmetic<float>::kOperands;
  static constexpr int kParam = Arithmetic<float>::kParam;
  static constexpr int kGrad = Arithmetic<float>::kGrad;
  static constexpr int kMaster = Arithmetic<float>::kMaster;
  static constexpr int kWidth =
      4;  // elements of a vector: 16 bytes of float, 8 of the narrow types

  TORCH_EXT_DEVICE static bool any_double(const Entry& entry) {
    bool any = false;
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      any = any || (entry.data[k] != nullptr && is_double(entry.type(k)));
    }
    return any;
  }

  TORCH_EXT_DEVICE static bool is_read(const Entry& entry, int operand) {
    return entry.data[operand] != nullptr && Arithmetic<float>::reads(operand, entry.flag != 0);
  }

  /// The master, unless the parameter is not its rounding any more: then somebody else has written
  /// the parameter.
  template <typename T>
  TORCH_EXT_DEVICE static T weight_of(const Entry& entry, const T (&values)[kOperands]) {
    if (entry.data[kMaster] == nullptr) return values[kParam];
    return rounded_to(values[kMaster], entry.type(kParam)) == values[kParam] ? values[kMaster]
                                                                             : values[kParam];
  }

  template <typename T>
  TORCH_EXT_DEVICE static void element(const Entry& entry, const std::int64_t (&offsets)[kOperands],
                                       const Arithmetic<T>& arithmetic, bool reset) {
    T values[kOperands];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      values[k] =
          is_read(entry, k) ? load_scalar<T>(entry.data[k], offsets[k], entry.type(k)) : T(0);
    }
    T weight = weight_of(entry, values);
    arithmetic.step(values, weight);
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (entry.data[k] == nullptr || (k == kGrad && !reset)) continue;
      const T value = k == kGrad ? T(0) : k == kParam || k == kMaster ? weight : values[k];
      store_scalar<T>(entry.data[k], offsets[k], entry.type(k), value);
    }
  }

  template <typename T>
  TORCH_EXT_DEVICE static void dense_element(const Entry& entry, std::int64_t offset,
                                             const Arithmetic<T>& arithmetic, bool reset) {
    std::int64_t offsets[kOperands];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) offsets[k] = offset;
    element(entry, offsets, arithmetic, reset);
  }

  template <typename T>
  TORCH_EXT_DEVICE static void dense_elements(int thread, const Entry& entry,
                                              std::uint32_t own_chunk,
                                              const Arithmetic<T>& arithmetic, bool reset) {
    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const std::int64_t end = min_of(begin + kChunkElements, entry.count);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t i = begin + thread; i < end; i += kThreads) {
      dense_element(entry, i, arithmetic, reset);
    }
  }

  /// Calls `body(offsets)` for this thread's places of a tile.
  template <typename Body>
  TORCH_EXT_DEVICE static void tile_places(int thread, const List& list, const Entry& entry,
                                           std::uint32_t own_chunk, const Body& body) {
    const LoopView loop = loop_view(list, entry);
    const ListTile tile = list_tile(loop, own_chunk);
    // Strides stay in the kernel's parameters: six operands' would fill the registers.
    std::int64_t starts[kOperands];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) starts[k] = tile_place(loop, tile, k).offset;
    TORCH_EXT_NO_UNROLL
    for (int place = thread; place < kTilePlaces; place += kThreads) {
      const std::int64_t row = place >> loop.tile_columns_log2;
      const std::int64_t col = place & ((1 << loop.tile_columns_log2) - 1);
      if (row >= tile.rows || col >= tile.cols) continue;
      std::int64_t offsets[kOperands];
      TORCH_EXT_UNROLL
      for (int k = 0; k < kOperands; ++k) {
        offsets[k] = starts[k] + element_place(loop, k, row, col);
      }
      body(offsets);
    }
  }

  /// One vector of each operand. Types differ from entry to entry, so the width of an access is
  /// decided here, alike for all threads of a block.
  TORCH_EXT_DEVICE static void dense_vector(const Entry& entry, std::int64_t offset,
                                            const Arithmetic<float>& arithmetic, bool reset) {
    MemoryVector<kVectorBytes> bits[kOperands];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (!is_read(entry, k)) continue;
      const void* const source = element_at(entry.data[k], offset, bytes_of(entry.type(k)));
      if (entry.type(k) == ScalarType::kFloat32) {
        bits[k] = load_vector<kVectorBytes>(source);
      } else {
        const MemoryVector<8> half = load_vector<8>(source);
        bits[k].words[0] = half.words[0];
        bits[k].words[1] = half.words[1];
      }
    }
    float values[kOperands][kWidth];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      TORCH_EXT_UNROLL
      for (int i = 0; i < kWidth; ++i) values[k][i] = 0.0f;
      if (is_read(entry, k)) widen(bits[k], entry.type(k), values[k]);
    }
    TORCH_EXT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      float element_values[kOperands];
      TORCH_EXT_UNROLL
      for (int k = 0; k < kOperands; ++k) element_values[k] = values[k][i];
      float weight = weight_of(entry, element_values);
      arithmetic.step(element_values, weight);
      element_values[kGrad] = 0.0f;
      element_values[kParam] = weight;
      element_values[kMaster] = weight;
      TORCH_EXT_UNROLL
      for (int k = 0; k < kOperands; ++k) values[k][i] = element_values[k];
    }
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      if (entry.data[k] == nullptr || (k == kGrad && !reset)) continue;
      void* const target = element_at(entry.data[k], offset, bytes_of(entry.type(k)));
      narrow(values[k], entry.type(k), bits[k]);
      if (entry.type(k) == ScalarType::kFloat32) {
        store_vector(target, bits[k]);
      } else {
        store_vector(target, MemoryVector<8>{{bits[k].words[0], bits[k].words[1]}});
      }
    }
  }

  TORCH_EXT_DEVICE static VectorSpan span_of(const Entry& entry, std::int64_t begin, int count) {
    const void* data[kOperands];
    int bytes[kOperands];
    TORCH_EXT_UNROLL
    for (int k = 0; k < kOperands; ++k) {
      bytes[k] = bytes_of(entry.type(k));
      data[k] = entry.data[k] == nullptr ? nullptr : element_at(entry.data[k], begin, bytes[k]);
    }
    return vector_span(data, bytes, count, kWidth);
  }

  /// A dense chunk in float.
  TORCH_EXT_DEVICE static void dense_vectors(int thread, const Entry& entry,
                                             std::uint32_t own_chunk,
                                             const Arithmetic<float>& arithmetic, bool reset) {
    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const int count = static_cast<int>(min_of(std::int64_t{kChunkElements}, entry.count - begin));
    const VectorSpan span = span_of(entry, begin, count);
    const int tail = span.head + span.vectors * kWidth;
    // Edges of both ends in one loop: the code is long.
    const int edge = span.head + count - tail;
    TORCH_EXT_NO_UNROLL
    for (int i = thread; i < edge; i += kThreads) {
      dense_element(entry, begin + (i < span.head ? i : tail + i - span.head), arithmetic, reset);
    }
    for (int i = thread; i < span.vectors; i += kThreads) {
      dense_vector(entry, begin + span.head + std::int64_t{i} * kWidth, arithmetic, reset);
    }
  }

  /// A skipped step: the accumulators alone become 0.
  TORCH_EXT_DEVICE static void reset_chunk(int thread, const List& list, const Entry& entry,
                                           std::uint32_t own_chunk) {
    const ScalarType type = entry.type(kGrad);
    if (entry.loop != 0) {
      return tile_places(thread, list, entry, own_chunk, [&](const auto& offsets) {
        store_scalar<float>(entry.data[kGrad], offsets[kGrad], type, 0.0f);
      });
    }
    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const std::int64_t end = min_of(begin + kChunkElements, entry.count);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t i = begin + thread; i < end; i += kThreads) {
      store_scalar<float>(entry.data[kGrad], i, type, 0.0f);
    }
  }

  /// `make(zero)` gives the arithmetic in the type of zero.
  template <typename Make>
  TORCH_EXT_DEVICE static void run(int thread, const List& list, const Entry& entry,
                                   std::uint32_t own_chunk, const StepScalars& scalars,
                                   const Make& make) {
    const bool reset = scalars.reset;
    if (scalars.is_skipped()) {
      if (reset) reset_chunk(thread, list, entry, own_chunk);
      return;
    }
    const auto elements = [&](const auto& arithmetic) {
      if (entry.loop == 0) return dense_elements(thread, entry, own_chunk, arithmetic, reset);
      tile_places(thread, list, entry, own_chunk,
                  [&](const auto& offsets) { element(entry, offsets, arithmetic, reset); });
    };
    if (any_double(entry)) {
      elements(make(0.0));
    } else if (entry.loop != 0) {
      elements(make(0.0f));
    } else {
      dense_vectors(thread, entry, own_chunk, make(0.0f), reset);
    }
  }
};

/// Step counts + 1 unless the step is skipped, and what hangs on them. A thread an entry.
template <int kListBytes>
struct AdamCountProgram {
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  using List = TensorList<1, kListBytes>;

  struct Args {
    AdamSettings settings;
    StepScalars scalars;
    double lr;
    ConstOperand device_lr;
    double weight_decay;
    AdamCorrections* corrections;
    List list;
  };

  static std::int64_t blocks(const List& list) { return ceil_div(list.num_entries, kThreads); }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const std::int64_t index = block.index() * kThreads + block.thread();
    if (index >= args.list.num_entries || args.scalars.is_skipped()) return;
    const auto& entry = args.list.entries[index];
    const double step = load_scalar<double>(entry.data[0], 0, entry.type(0)) + 1.0;
    store_scalar<double>(entry.data[0], 0, entry.type(0), step);
    args.corrections[args.list.first_entry + index] = adam_corrections(
        args.settings, step, scalar_operand(args.device_lr, args.lr), args.weight_decay);
  }
};

template <int kListBytes>
struct AdamStepProgram {
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 5;

  using List = TensorList<kAdamOperands, kListBytes>;
  using Chunks = StepChunks<AdamArithmetic, List, kThreads>;

  struct Args {
    AdamSettings settings;
    StepScalars scalars;
    const AdamCorrections* corrections;
    List list;
  };

  static std::int64_t blocks(const List& list) { return list.num_chunks; }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const auto chunk = static_cast<std::uint32_t>(block.index());
    const int index = entry_of_chunk(args.list, chunk);
    const auto& entry = args.list.entries[index];
    Chunks::run(block.thread(), args.list, entry, chunk - entry.first_chunk, args.scalars,
                [&](auto zero) {
                  using T = decltype(zero);
                  return AdamArithmetic<T>::make(args.settings,
                                                 args.corrections[args.list.first_entry + index],
                                                 args.scalars.signed_coefficient());
                });
  }
};

template <int kListBytes>
struct SgdStepProgram {
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 3;

  using List = TensorList<kSgdOperands, kListBytes>;
  using Chunks = StepChunks<SgdArithmetic, List, kThreads>;

  struct Args {
    SgdSettings settings;
    StepScalars scalars;
    double lr;
    ConstOperand device_lr;
    List list;
  };

  static std::int64_t blocks(const List& list) { return list.num_chunks; }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const auto chunk = static_cast<std::uint32_t>(block.index());
    const auto& entry = args.list.entries[entry_of_chunk(args.list, chunk)];
    Chunks::run(
        block.thread(), args.list, entry, chunk - entry.first_chunk, args.scalars, [&](auto zero) {
          using T = decltype(zero);
          return SgdArithmetic<T>::make(args.settings, scalar_operand(args.device_lr, args.lr),
                                        args.scalars.signed_coefficient(),
                                        entry.data[kSgdMomentum] != nullptr, entry.flag != 0);
        });
  }
};

}  // namespace torch_ext::cuda
