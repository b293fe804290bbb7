// Joins the splits of the keys in their order, one block a row.
#pragma once

#include "device_attention.h"
#include "element_store.cuh"
#include "online_softmax.cuh"

namespace torch_ext::cuda {

/// T: float or double, of the partial results.
template <typename Element_, typename T>
struct AttentionCombineProgram {
  using Args = AttentionForwardArgs;
  static constexpr int kThreads = 64;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const std::int64_t rows = args.rows();
    const std::int64_t slice = block.index() / rows;
    const std::int64_t row = block.index() % rows;
    const std::int64_t heads = args.shape.query_heads / args.pack;
    const std::int64_t batch = slice / heads;
    const std::int64_t head = slice % heads * args.pack + row % args.pack;
    const std::int64_t query = row / args.pack;
    const T* stats = static_cast<const T*>(args.partial_stats) + (slice * rows + row) * 2;
    const std::int64_t split_rows = args.slices() * rows;

    T maximum = -infinity<T>();
    for (std::int64_t split = 0; split < args.splits; ++split) {
      const T candidate = stats[split * split_rows * 2];
      if (candidate > maximum) maximum = candidate;
    }
    const T reference = maximum == -infinity<T>() ? T{0} : maximum;
    const T log2 = static_cast<T>(args.unit * kLog2eDouble);
    T sum = 0;
    for (std::int64_t split = 0; split < args.splits; ++split) {
      sum += block.exp2((stats[split * split_rows * 2] - reference) * log2) *
             stats[split * split_rows * 2 + 1];
    }
    const T inverse = sum == T{0} ? T{0} : static_cast<T>(args.dropout.scale) / sum;
    const T* out =
        static_cast<const T*>(args.partial_out) + (slice * rows + row) * args.shape.value_dim;
    const std::int64_t target =
        slice_start(args.out, args.shape, batch, head) + query * args.out.row_stride;
    for (std::int64_t d = block.thread(); d < args.shape.value_dim; d += kThreads) {
      T joined = 0;
      for (std::int64_t split = 0; split < args.splits; ++split) {
        joined += block.exp2((stats[split * split_rows * 2] - reference) * log2) *
                  out[split * split_rows * args.shape.value_dim + d];
      }
      store_element<Element_>(block, args.out.data, target + d * args.out.col_stride,
                              joined * inverse);
    }
    if (args.logsumexp != nullptr && block.thread() == 0) {
      static_cast<T*>(
          args.logsumexp)[(batch * args.shape.query_heads + head) * args.shape.q_len + query] =
          row_logsumexp(block, maximum, static_cast<T>(args.unit), sum);
    }
  }
};

}  // namespace torch_ext::cuda
