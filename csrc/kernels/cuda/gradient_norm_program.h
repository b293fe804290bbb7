// Norms of a list of tensors and whether they are finite, in one read and three programs: a block a
// chunk, a block an entry, one block for all. Every sum has its order from the shapes alone: not
// from the addresses, nor from which block is faster.
#pragma once

#include <cmath>
#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"
#include "memory_vector.h"
#include "ordered_sum.h"
#include "tensor_list.h"

namespace torch_ext::cuda {

/// Runs the phases of a program, kPhases of them, with a barrier in front of each but the first.
template <typename Program, typename Block, int kPhase = 0>
TORCH_EXT_DEVICE void run_phases(Block& block, const typename Program::Args& args,
                                 typename Program::Shared& shared) {
  Program::template phase<kPhase>(block, args, shared);
  if constexpr (kPhase + 1 < Program::kPhases) {
    block.sync();
    run_phases<Program, Block, kPhase + 1>(block, args, shared);
  }
}

template <int kThreads>
struct SumShared {
  SquareSum values[kThreads];
  SquareSum folded[BlockSum<kThreads>::kFolders];
};

template <int kListBytes>
struct ChunkNormProgram {
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 4;
  static constexpr int kPhases = 3;
  static constexpr int kInFlight = 4;

  using List = TensorList<1, kListBytes>;
  using Shared = SumShared<kThreads>;
  using Sum = BlockSum<kThreads>;

  struct Args {
    SquareSum* chunk_sums;
    bool in_double;  // every square is added in double, as norms of fp64 ask for
    List list;
  };

  static std::int64_t blocks(const List& list) { return list.num_chunks; }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    run_phases<ChunkNormProgram>(block, args, block.template shared<Shared>());
  }

  template <int kPhase, typename Block>
  TORCH_EXT_DEVICE static void phase(Block& block, const Args& args, Shared& shared) {
    const int thread = block.thread();
    if constexpr (kPhase == 0) {
      Sum::put(thread, own_sum(thread, args, static_cast<std::uint32_t>(block.index())),
               shared.values);
    } else if constexpr (kPhase == 1) {
      Sum::fold(thread, shared.values, shared.folded);
    } else if (thread == 0) {
      args.chunk_sums[args.list.first_chunk + block.index()] = Sum::total(shared.folded);
    }
  }

 private:
  using Entry = typename List::Entry;

  template <typename T>
  TORCH_EXT_DEVICE static bool is_finite(T x) {
    return x - x == T(0);
  }

  TORCH_EXT_DEVICE static void add_double(double x, SquareSum& sum) {
    sum.sum += x * x;
    const double small = x * kDownscale;
    sum.downscaled += small * small;
    if (!is_finite(x)) sum.not_finite = 1.0;
  }

  /// Squares of a few floats are added in float where that neither overflows nor vanishes, which
  /// spares all but one addition in double.
  template <int kCount>
  TORCH_EXT_DEVICE static void add_floats(const float (&x)[kCount], bool in_double,
                                          SquareSum& sum) {
    float squares = 0.0f;
    float largest = 0.0f;
    TORCH_EXT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      squares += x[i] * x[i];
      largest = max_of(largest, x[i] < 0.0f ? -x[i] : x[i]);
    }
    if (!in_double && squares > 1e-30f && squares < 1e30f) {
      sum.sum += static_cast<double>(squares);
    } else if (largest > 0.0f || !is_finite(squares)) {
      TORCH_EXT_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const double wide = static_cast<double>(x[i]);
        sum.sum += wide * wide;
        if (!is_finite(x[i])) sum.not_finite = 1.0;
      }
    }
  }

  TORCH_EXT_DEVICE static SquareSum own_sum(int thread, const Args& args, std::uint32_t chunk) {
    const List& list = args.list;
    const Entry& entry = list.entries[entry_of_chunk(list, chunk)];
    const std::uint32_t own_chunk = chunk - entry.first_chunk;
    SquareSum sum{};
    if (entry.loop != 0) {
      add_tile(thread, args, entry, own_chunk, sum);
    } else {
      switch (entry.type(0)) {
        case ScalarType::kFloat32:
          add_dense<ScalarType::kFloat32>(thread, args, entry, own_chunk, sum);
          break;
        case ScalarType::kFloat64:
          add_dense<ScalarType::kFloat64>(thread, args, entry, own_chunk, sum);
          break;
        case ScalarType::kBFloat16:
          add_dense<ScalarType::kBFloat16>(thread, args, entry, own_chunk, sum);
          break;
        default:
          add_dense<ScalarType::kFloat16>(thread, args, entry, own_chunk, sum);
          break;
      }
    }
    // Squares of floats do not overflow in double: infinite ones are infinite on both scales.
    if (!is_double(entry.type(0))) sum.downscaled = sum.sum * kDownscale * kDownscale;
    return sum;
  }

  TORCH_EXT_DEVICE static void add_tile(int thread, const Args& args, const Entry& entry,
                                        std::uint32_t own_chunk, SquareSum& sum) {
    const LoopView loop = loop_view(args.list, entry);
    const ListTile tile = list_tile(loop, own_chunk);
    const TilePlace start = tile_place(loop, tile, 0);
    for (int place = thread; place < kTilePlaces; place += kThreads) {
      const std::int64_t row = place >> loop.tile_columns_log2;
      const std::int64_t col = place & ((1 << loop.tile_columns_log2) - 1);
      if (row >= tile.rows || col >= tile.cols) continue;
      const std::int64_t offset = start.offset + row * start.row_stride + col * start.col_stride;
      if (is_double(entry.type(0))) {
        add_double(load_scalar<double>(entry.data[0], offset, entry.type(0)), sum);
      } else {
        const float x[1] = {load_scalar<float>(entry.data[0], offset, entry.type(0))};
        add_floats(x, args.in_double, sum);
      }
    }
  }

  /// Which thread adds up which elements does not depend on the address: where a tensor is not
  /// aligned, a thread reads the elements of its vectors one by one.
  template <ScalarType kType>
  TORCH_EXT_DEVICE static void add_dense(int thread, const Args& args, const Entry& entry,
                                         std::uint32_t own_chunk, SquareSum& sum) {
    constexpr int kBytes = bytes_of(kType);
    constexpr int kWidth = kVectorBytes / kBytes;
    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const int count = static_cast<int>(min_of(std::int64_t{kChunkElements}, entry.count - begin));
    const void* const data = element_at(static_cast<const void*>(entry.data[0]), begin, kBytes);
    const int whole = count / kWidth;
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;
    if (is_aligned) {
      for (int i = thread; i < whole; i += kThreads * kInFlight) {
        MemoryVector<kVectorBytes> bits[kInFlight];
        TORCH_EXT_UNROLL
        for (int k = 0; k < kInFlight; ++k) {
          const int vector = i + k * kThreads;
          if (vector >= whole) continue;
          bits[k] = load_vector<kVectorBytes>(element_at(data, vector, kVectorBytes));
        }
        TORCH_EXT_UNROLL
        for (int k = 0; k < kInFlight; ++k) {
          if (i + k * kThreads < whole) add_vector<kType>(bits[k], args.in_double, sum);
        }
      }
    }
    // The last vector is no whole one.
    for (int i = thread; i * kWidth < count; i += kThreads) {
      if (is_aligned && i < whole) continue;
      add_elements<kType>(data, i * kWidth, min_of(kWidth, count - i * kWidth), args.in_double,
                          sum);
    }
  }

  template <ScalarType kType>
  TORCH_EXT_DEVICE static void add_vector(const MemoryVector<kVectorBytes>& bits, bool in_double,
                                          SquareSum& sum) {
    constexpr int kWidth = kVectorBytes / bytes_of(kType);
    if constexpr (is_double(kType)) {
      TORCH_EXT_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        add_double(double_of_bits(bits.words[2 * i], bits.words[2 * i + 1]), sum);
      }
    } else {
      float x[kWidth];
      widen(bits, kType, x);
      add_floats(x, in_double, sum);
    }
  }

  template <ScalarType kType>
  TORCH_EXT_DEVICE static void add_elements(const void* data, int first, int count, bool in_double,
                                            SquareSum& sum) {
    constexpr int kWidth = kVectorBytes / bytes_of(kType);
    if constexpr (is_double(kType)) {
      for (int i = 0; i < count; ++i) add_double(load_scalar<double>(data, first + i, kType), sum);
    } else {
      float x[kWidth];
      TORCH_EXT_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        x[i] = i < count ? load_scalar<float>(data, first + i, kType) : 0.0f;
      }
      add_floats(x, in_double, sum);
    }
  }
};

TORCH_EXT_DEVICE double norm_of(const SquareSum& sum) {
  return sum.sum <= 1e308 ? sqrt(sum.sum) : sqrt(sum.downscaled) * kUpscale;
}

/// The chunks of each entry of a list, in order.
template <int kListBytes>
struct EntryNormProgram {
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 8;
  static constexpr int kPhases = 3;

  using List = TensorList<1, kListBytes>;
  using Shared = SumShared<kThreads>;
  using Sum = BlockSum<kThreads>;

  struct Args {
    const SquareSum* chunk_sums;
    SquareSum* entry_sums;
    void* norms;
    ScalarType norm_type;
    List list;
  };

  static std::int64_t blocks(const List& list) { return list.num_entries; }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    run_phases<EntryNormProgram>(block, args, block.template shared<Shared>());
  }

  template <int kPhase, typename Block>
  TORCH_EXT_DEVICE static void phase(Block& block, const Args& args, Shared& shared) {
    const int thread = block.thread();
    if constexpr (kPhase == 0) {
      const auto index = static_cast<int>(block.index());
      const List& list = args.list;
      const std::uint32_t end =
          index + 1 < list.num_entries ? list.entries[index + 1].first_chunk : list.num_chunks;
      const SquareSum* const sums = args.chunk_sums + list.first_chunk;
      SquareSum sum{};
      for (std::uint32_t i = list.entries[index].first_chunk + static_cast<std::uint32_t>(thread);
           i < end; i += kThreads) {
        sum.add(sums[i]);
      }
      Sum::put(thread, sum, shared.values);
    } else if constexpr (kPhase == 1) {
      Sum::fold(thread, shared.values, shared.folded);
    } else if (thread == 0) {
      const std::int64_t entry = args.list.first_entry + block.index();
      const SquareSum sum = Sum::total(shared.folded);
      args.entry_sums[entry] = sum;
      store_scalar<double>(args.norms, entry, args.norm_type, norm_of(sum));
    }
  }
};

/// All entries, in order.
struct TotalNormProgram {
  static constexpr int kThreads = 512;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr int kPhases = 3;

  using Shared = SumShared<kThreads>;
  using Sum = BlockSum<kThreads>;

  struct Args {
    const SquareSum* entry_sums;
    std::int64_t num_entries;
    void* norm;
    ScalarType norm_type;
    float* found_inf;
  };

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    run_phases<TotalNormProgram>(block, args, block.template shared<Shared>());
  }

  template <int kPhase, typename Block>
  TORCH_EXT_DEVICE static void phase(Block& block, const Args& args, Shared& shared) {
    const int thread = block.thread();
    if constexpr (kPhase == 0) {
      SquareSum sum{};
      for (std::int64_t i = thread; i < args.num_entries; i += kThreads) {
        sum.add(args.entry_sums[i]);
      }
      Sum::put(thread, sum, shared.values);
    } else if constexpr (kPhase == 1) {
      Sum::fold(thread, shared.values, shared.folded);
    } else if (thread == 0) {
      const SquareSum sum = Sum::total(shared.folded);
      store_scalar<double>(args.norm, 0, args.norm_type, norm_of(sum));
      *args.found_inf = sum.not_finite > 0.0 ? 1.0f : 0.0f;
    }
  }
};

}  // namespace torch_ext::cuda
