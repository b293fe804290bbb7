// accumulator = beta * accumulator + scale * grad over a list of tensors: a block a chunk.
#pragma once

#include <cstdint>

#include "../accumulation_params.h"
#include "device_program.h"
#include "list_launch.h"
#include "memory_vector.h"
#include "tensor_list.h"
#include "vector_span.h"

namespace torch_ext::cuda {

template <int kListBytes>
struct AccumulateProgram {
  static constexpr int kThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 4;
  /// Vectors of each operand on their way to a thread at once: with 1024 threads a multiprocessor
  /// 64 to 128 KB, four times what the latency of an H100's memory asks for.
  static constexpr int kInFlight = 4;

  using List = TensorList<2, kListBytes>;
  enum Operand { kAccumulator, kGrad };

  struct Args {
    double beta;
    ConstOperand scale;
    List list;
  };

  static std::int64_t blocks(const List& list) { return list.num_chunks; }

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const auto chunk = static_cast<std::uint32_t>(block.index());
    const auto& entry = args.list.entries[entry_of_chunk(args.list, chunk)];
    const std::uint32_t own_chunk = chunk - entry.first_chunk;
    if (is_double(entry.type(kAccumulator)) || is_double(entry.type(kGrad))) {
      const Scalars<double> scalars{args.beta, scalar_operand(args.scale, 1.0)};
      return entry.loop == 0 ? dense_elements(block.thread(), entry, own_chunk, scalars)
                             : tile_elements(block.thread(), args.list, entry, own_chunk, scalars);
    }
    const Scalars<float> scalars{static_cast<float>(args.beta), scalar_operand(args.scale, 1.0f)};
    if (entry.loop != 0) {
      return tile_elements(block.thread(), args.list, entry, own_chunk, scalars);
    }
    with_type(entry.type(kAccumulator), [&](auto accumulator_type) {
      with_type(entry.type(kGrad), [&](auto grad_type) {
        if (scalars.beta == 0.0f) {
          dense_vectors<accumulator_type.kType, grad_type.kType, true>(block.thread(), entry,
                                                                       own_chunk, scalars);
        } else {
          dense_vectors<accumulator_type.kType, grad_type.kType, false>(block.thread(), entry,
                                                                        own_chunk, scalars);
        }
      });
    });
  }

 private:
  template <typename T>
  struct Scalars {
    T beta;
    T scale;
  };

  using Entry = typename List::Entry;

  template <ScalarType kElement>
  struct TypeConstant {
    static constexpr ScalarType kType = kElement;
  };

  /// The element type, not double, as a constant.
  template <typename Body>
  TORCH_EXT_DEVICE static void with_type(ScalarType type, const Body& body) {
    if (type == ScalarType::kFloat32) return body(TypeConstant<ScalarType::kFloat32>{});
    if (type == ScalarType::kBFloat16) return body(TypeConstant<ScalarType::kBFloat16>{});
    body(TypeConstant<ScalarType::kFloat16>{});
  }

  template <typename T>
  TORCH_EXT_DEVICE static void element(const Entry& entry, std::int64_t accumulator_offset,
                                       std::int64_t grad_offset, const Scalars<T>& scalars) {
    const ScalarType type = entry.type(kAccumulator);
    T sum = scalars.scale * load_scalar<T>(entry.data[kGrad], grad_offset, entry.type(kGrad));
    if (scalars.beta != T(0)) {
      sum += scalars.beta * load_scalar<T>(entry.data[kAccumulator], accumulator_offset, type);
    }
    store_scalar<T>(entry.data[kAccumulator], accumulator_offset, type, sum);
  }

  template <typename T>
  TORCH_EXT_DEVICE static void dense_elements(int thread, const Entry& entry,
                                              std::uint32_t own_chunk, const Scalars<T>& scalars) {
    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const std::int64_t end = min_of(begin + kChunkElements, entry.count);
    TORCH_EXT_NO_UNROLL
    for (std::int64_t i = begin + thread; i < end; i += kThreads) element(entry, i, i, scalars);
  }

  template <typename T>
  TORCH_EXT_DEVICE static void tile_elements(int thread, const List& list, const Entry& entry,
                                             std::uint32_t own_chunk, const Scalars<T>& scalars) {
    const LoopView loop = loop_view(list, entry);
    const ListTile tile = list_tile(loop, own_chunk);
    const TilePlace accumulator = tile_place(loop, tile, kAccumulator);
    const TilePlace grad = tile_place(loop, tile, kGrad);
    TORCH_EXT_NO_UNROLL
    for (int place = thread; place < kTilePlaces; place += kThreads) {
      const std::int64_t row = place >> loop.tile_columns_log2;
      const std::int64_t col = place & ((1 << loop.tile_columns_log2) - 1);
      if (row >= tile.rows || col >= tile.cols) continue;
      element(entry,
              accumulator.offset + row * accumulator.row_stride + col * accumulator.col_stride,
              grad.offset + row * grad.row_stride + col * grad.col_stride, scalars);
    }
  }

  template <ScalarType kAccumulatorType, ScalarType kGradType, bool kOverwrite>
  TORCH_EXT_DEVICE static void dense_vectors(int thread, const Entry& entry,
                                             std::uint32_t own_chunk,
                                             const Scalars<float>& scalars) {
    constexpr int kBytes = bytes_of(kAccumulatorType);
    constexpr int kGradBytes = bytes_of(kGradType);
    // The wider operand in 16 bytes: with 16 of a narrower one, a thread's next 16 bytes would lie
    // between its neighbours', and each store would write half sectors.
    constexpr int kWidth = kVectorBytes / (kBytes > kGradBytes ? kBytes : kGradBytes);
    constexpr int kAccumulatorVector = kWidth * kBytes;
    constexpr int kGradVector = kWidth * kGradBytes;

    const std::int64_t begin = std::int64_t{own_chunk} * kChunkElements;
    const int count = static_cast<int>(min_of(std::int64_t{kChunkElements}, entry.count - begin));
    void* const accumulator = element_at(entry.data[kAccumulator], begin, kBytes);
    const void* const grad = element_at(entry.data[kGrad], begin, kGradBytes);
    const void* const data[2] = {accumulator, grad};
    const int bytes[2] = {kBytes, kGradBytes};
    const VectorSpan span = vector_span(data, bytes, count, kWidth);
    const int tail = span.head + span.vectors * kWidth;
    TORCH_EXT_NO_UNROLL
    for (int i = thread; i < span.head; i += kThreads) {
      element(entry, begin + i, begin + i, scalars);
    }
    TORCH_EXT_NO_UNROLL
    for (int i = tail + thread; i < count; i += kThreads) {
      element(entry, begin + i, begin + i, scalars);
    }

    void* const first = element_at(accumulator, span.head, kBytes);
    const void* const first_grad = element_at(grad, span.head, kGradBytes);
    for (int i = thread; i < span.vectors; i += kThreads * kInFlight) {
      MemoryVector<kAccumulatorVector> sums[kInFlight];
      MemoryVector<kGradVector> grads[kInFlight];
      TORCH_EXT_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int vector = i + k * kThreads;
        if (vector >= span.vectors) continue;
        grads[k] = load_vector_once<kGradVector>(element_at(first_grad, vector, kGradVector));
        if constexpr (!kOverwrite) {
          sums[k] = load_vector<kAccumulatorVector>(element_at(first, vector, kAccumulatorVector));
        }
      }
      TORCH_EXT_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int vector = i + k * kThreads;
        if (vector >= span.vectors) continue;
        float sum[kWidth];
        float addend[kWidth];
        widen(grads[k], kGradType, addend);
        if constexpr (!kOverwrite) widen(sums[k], kAccumulatorType, sum);
        TORCH_EXT_UNROLL
        for (int e = 0; e < kWidth; ++e) {
          addend[e] *= scalars.scale;
          if constexpr (!kOverwrite) addend[e] += scalars.beta * sum[e];
        }
        narrow(addend, kAccumulatorType, sums[k]);
        store_vector(element_at(first, vector, kAccumulatorVector), sums[k]);
      }
    }
  }
};

template <typename Launcher>
typename Launcher::Status launch_accumulate(const Launcher& launcher,
                                            const AccumulateParams& params) {
  const auto item_of = [&](std::int64_t i) {
    const AccumulateEntry& entry = params.entries[i];
    return ListItem<2>{{entry.accumulator.data, const_cast<void*>(entry.grad.data)},
                       {entry.accumulator.type, entry.grad.type},
                       entry.count,
                       entry.loop,
                       false};
  };
  const auto set_up = [&](auto& args) {
    args.beta = params.beta;
    args.scale = params.scale;
  };
  return launch_list_program<AccumulateProgram>(launcher, params.num_entries, item_of, set_up);
}

}  // namespace torch_ext::cuda
