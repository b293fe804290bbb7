// What every pass over the scores needs of a row: its logsumexp, delta = rowsum(grad_out * out) -
// grad_logsumexp, and what logsumexp lacks. One warp a row.
#pragma once

#include "attention_scalar_tile.cuh"
#include "device_attention.h"
#include "score_mask.cuh"

namespace torch_ext::cuda {

/// A weight is 2^((score - reference) * log2(e) + exponent).
template <typename T>
struct RowStats {
  T reference;  // logsumexp
  T delta;
  T exponent;
};

/// A logsumexp beyond this is rounded by more than weights can bear, 6e-5 in a float: by the whole
/// logarithm of the number of keys in a row whose every key carries a huge finite mask.
template <typename T>
TORCH_EXT_DEVICE bool is_large_logsumexp(T logsumexp) {
  return (logsumexp > T{1024} || logsumexp < T{-1024}) && logsumexp > -infinity<T>() &&
         logsumexp < infinity<T>();
}

/// What the rounding of a large logsumexp took away or added, as an exponent of 2, from the row's
/// scores once more: by a whole warp, each lane every 32nd key. Where one key takes it all it is
/// exactly 0, whatever the order of the products; a logsumexp joined with that of other keys is
/// left as it is.
template <typename Element, typename T, typename Block>
TORCH_EXT_DEVICE T lacking_exponent(Block& block, const AttentionBackwardArgs& args,
                                    std::int64_t batch, std::int64_t head, std::int64_t row,
                                    T logsumexp) {
  const DeviceShape& shape = args.shape;
  const RowSource query = row_source(args.query, shape, batch, head);
  const RowSource key = row_source(args.key, shape, batch, head / shape.group);
  const std::int64_t mask_start = slice_start(args.masking.mask, shape, batch, head);
  const std::int64_t padding_start = slice_start(args.masking.padding, shape, batch, 0);
  T maximum = -infinity<T>();
  T sum = T{0};
  TORCH_EXT_NO_UNROLL
  for (std::int64_t j = block.thread() % kWarpSize; j < shape.kv_len; j += kWarpSize) {
    T product = T{0};
    TORCH_EXT_NO_UNROLL
    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
      product += query.template load<Element, T>(block, row, d) *
                 key.template load<Element, T>(block, j, d);
    }
    const T score =
        pair_score<Element>(block, args.masking, shape, product, static_cast<T>(args.scale), row, j,
                            mask_start, padding_start);
    const T best = max_of(maximum, score);
    const T reference = best == -infinity<T>() ? T{0} : best;
    sum = sum * block.exp2((maximum - reference) * static_cast<T>(kLog2eDouble)) +
          block.exp2((score - reference) * static_cast<T>(kLog2eDouble));
    maximum = best;
  }
  T largest = maximum;
  TORCH_EXT_UNROLL
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    largest = max_of(largest, block.shuffle_xor(largest, lanes));
  }
  if (maximum == -infinity<T>()) {
    sum = T{0};
  } else {
    sum *= block.exp2((maximum - largest) * static_cast<T>(kLog2eDouble));
  }
  TORCH_EXT_UNROLL
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) sum += block.shuffle_xor(sum, lanes);
  const T rest = block.log(sum);
  const T rounded = largest + rest;
  const T difference = rounded - logsumexp;
  const T size = logsumexp < T{0} ? -logsumexp : logsumexp;
  const T tolerance = size * static_cast<T>(sizeof(T) == 8 ? 0x1p-40 : 0x1p-14);
  if (!(difference <= tolerance && -difference <= tolerance)) return T{0};
  return ((rounded - largest) - rest) * static_cast<T>(kLog2eDouble);
}

/// Writes what there is to say of a row, given rowsum(grad_out * out): by a whole warp. Rows beyond
/// the last query get weights of 0.
template <typename Element, typename T, typename Block>
TORCH_EXT_DEVICE void store_backward_stats(Block& block, const AttentionBackwardArgs& args,
                                           std::int64_t slice, std::int64_t row, T delta) {
  const DeviceShape& shape = args.shape;
  T* stats = static_cast<T*>(args.row_stats) + slice * kRowStats * args.padded_rows + row;
  T logsumexp = infinity<T>();
  T exponent = T{0};
  if (row < shape.q_len) {
    const std::int64_t place = slice * shape.q_len + row;
    logsumexp = static_cast<const T*>(args.logsumexp)[place];
    if (logsumexp == -infinity<T>()) {
      logsumexp = infinity<T>();
    } else if (args.grad_logsumexp != nullptr) {
      delta -= static_cast<const T*>(args.grad_logsumexp)[place];
    }
    if (is_large_logsumexp(logsumexp)) {
      exponent = lacking_exponent<Element, T>(block, args, slice / shape.query_heads,
                                              slice % shape.query_heads, row, logsumexp);
    }
  } else {
    delta = T{0};
  }
  if (block.thread() % kWarpSize != 0) return;
  stats[0] = logsumexp;
  stats[args.padded_rows] = delta;
  stats[2 * args.padded_rows] = exponent;
}

/// For the ordinary units: delta is added up column by column, as they add up dP. Where one key
/// takes it all the two are the same bits, and cancel.
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
    T delta = T{0};
    if (row < shape.q_len) {
      const std::int64_t batch = slice / shape.query_heads;
      const std::int64_t head = slice % shape.query_heads;
      const RowSource out = row_source(args.out, shape, batch, head);
      const RowSource grad_out = row_source(args.grad_out, shape, batch, head);
      TORCH_EXT_NO_UNROLL
      for (std::int64_t first = 0; first < shape.value_dim; first += kWarpSize) {
        const bool inside = first + lane < shape.value_dim;
        const T own_grad =
            inside ? grad_out.template load<Element, T>(block, row, first + lane) : T{0};
        const T own_out = inside ? out.template load<Element, T>(block, row, first + lane) : T{0};
        TORCH_EXT_UNROLL
        for (int d = 0; d < kWarpSize; ++d) {
          delta += block.shuffle(own_grad, d) * block.shuffle(own_out, d);
        }
      }
    }
    store_backward_stats<Element>(block, args, slice, row, delta);
  }
};

/// A weight and the gradient of its score.
template <typename T>
struct WeightAndGradient {
  T weight;
  T grad_score;
};

/// From a natural score, dP before dropout's factor, and the row's stats. Masked scores are -inf;
/// kept and keep_scale are dropout's.
template <typename T, bool kMasked, typename Block>
TORCH_EXT_DEVICE WeightAndGradient<T> weigh(Block& block, T score, T grad_weight,
                                            const RowStats<T>& row, bool kept, T keep_scale) {
  T x = score - row.reference;
  // At most 0 where logsumexp is the forward pass's own. A NaN stays.
  x = x > T{0} ? T{0} : x;
  x = x * static_cast<T>(kLog2eDouble) + row.exponent;
  if constexpr (kMasked) {
    if (x < negligible_exponent<T>()) return {T{0}, T{0}};
  }
  T weight;
  if constexpr (sizeof(T) == 4) {
    weight = block.exp2_fast(x);
  } else {
    weight = block.exp2(x);
  }
  grad_weight = kept ? grad_weight * keep_scale : T{0};
  return {kept ? weight : T{0}, weight * (grad_weight - row.delta)};
}

}  // namespace torch_ext::cuda
