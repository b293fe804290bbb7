// What every pass over the scores needs of a row: its logsumexp in the log2 domain, and
// delta = rowsum(grad_out * out) - grad_logsumexp. One warp a row.
#pragma once

#include "device_attention.h"
#include "score_mask.cuh"

namespace torch_ext::cuda {

template <typename Element, typename T>
struct AttentionRowStatsProgram {
  using Args = AttentionBackwardArgs;
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 0;
  static constexpr int kBlocksPerUnit = 1;
  static constexpr std::int64_t kRowsPerBlock = kThreads / kWarpSize;

  template <typename Block>
  TORCH_EXT_DEVICE static void run(Block& block, const Args& args) {
    const DeviceShape& shape = args.shape;
    const std::int64_t index = block.index() * kRowsPerBlock + block.thread() / kWarpSize;
    const std::int64_t slice = index / args.padded_rows;
    const std::int64_t row = index % args.padded_rows;
    if (slice >= shape.batch * shape.query_heads) return;
    const int lane = block.thread() % kWarpSize;
    T* stats = static_cast<T*>(args.row_stats) + slice * 2 * args.padded_rows + row;
    if (row >= shape.q_len) {
      if (lane == 0) {
        stats[0] = infinity<T>();
        stats[args.padded_rows] = T{0};
      }
      return;
    }
    const std::int64_t batch = slice / shape.query_heads;
    const std::int64_t head = slice % shape.query_heads;
    const std::int64_t out_row =
        slice_start(args.out, shape, batch, head) + row * args.out.row_stride;
    const std::int64_t grad_row =
        slice_start(args.grad_out, shape, batch, head) + row * args.grad_out.row_stride;
    T sum = T{0};
    for (std::int64_t d = lane; d < shape.value_dim; d += kWarpSize) {
      sum += load_element<Element, T>(block, args.out.data, out_row + d * args.out.col_stride) *
             load_element<Element, T>(block, args.grad_out.data,
                                      grad_row + d * args.grad_out.col_stride);
    }
    TORCH_EXT_UNROLL
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) sum += block.shuffle_xor(sum, lanes);
    if (lane != 0) return;
    const std::int64_t place = slice * shape.q_len + row;
    const T logsumexp = static_cast<const T*>(args.logsumexp)[place];
    const bool attends = !(logsumexp < lowest_logsumexp<T>());
    if (args.grad_logsumexp != nullptr && attends) {
      sum -= static_cast<const T*>(args.grad_logsumexp)[place];
    }
    stats[0] = attends ? logsumexp * static_cast<T>(1.4426950408889634) : infinity<T>();
    stats[args.padded_rows] = sum;
  }
};

/// A weight and the gradient of its score.
template <typename T>
struct WeightAndGradient {
  T weight;
  T grad_score;
};

/// From a score in the log2 domain, dP before dropout's factor, and the row's stats. Masked scores
/// are -inf; kept and keep_scale are dropout's.
template <typename T, bool kMasked, typename Block>
TORCH_EXT_DEVICE WeightAndGradient<T> weigh(Block& block, T score, T grad_weight, T logsumexp,
                                            T delta, bool kept, T keep_scale) {
  T x = score - logsumexp;
  if constexpr (kMasked) {
    // Weights are at most 1, but for the rounding of huge scores that a mask makes. A NaN stays.
    x = x > T{1} ? T{1} : x;
    if (x < negligible_exponent<T>()) return {T{0}, T{0}};
  }
  T weight;
  if constexpr (sizeof(T) == 4) {
    weight = block.exp2_fast(x);
  } else {
    weight = block.exp2(x);
  }
  grad_weight = kept ? grad_weight * keep_scale : T{0};
  return {kept ? weight : T{0}, weight * (grad_weight - delta)};
}

}  // namespace torch_ext::cuda
