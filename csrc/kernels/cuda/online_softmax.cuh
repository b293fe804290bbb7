// The running softmax of the rows that a thread shares with the other three of its quad
// (Milakov and Gimelshein, arXiv 1805.02867). Scores are natural ones, or the products alone, which
// round nothing on the way: weight = 2^((score - reference) * factor).
#pragma once

#include <cstdint>

#include "device_program.h"

namespace torch_ext::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr double kLog2eDouble = 1.4426950408889634;

template <typename T>
TORCH_EXT_DEVICE T infinity() {
  return static_cast<T>(__builtin_huge_val());
}

/// Rows of which a maximum grew by less than this are not rescaled (FlashAttention-4): weights stay
/// below 2^8.
inline constexpr float kRescaleThreshold = 8.0f;
/// Exponents beyond this are rescaled for any growth: logsumexp is the maximum itself then, where
/// one key takes it all, and not two roundings away from it.
inline constexpr float kLargeExponent = 64.0f;

/// Natural logarithm of a row's sum of exponentials, unit * reference a natural score. Some weight
/// is 1 or more, so nothing is below the reference's own score: rounded as the backward pass rounds
/// scores.
template <typename T, typename Block>
TORCH_EXT_DEVICE T row_logsumexp(Block& block, T reference, T unit, T sum) {
  if (sum == T{0}) return -infinity<T>();
  const T rest = block.log(sum);
  return block.product(reference, unit) + (rest < T{0} ? T{0} : rest);
}

template <int kMTiles>
struct OnlineSoftmax {
  // [m][half]: row 16 m + 8 half + lane / 4
  float maximum[kMTiles][2];  // what the weights refer to
  float sum[kMTiles][2];      // of this thread's columns, before dropout

  TORCH_EXT_DEVICE void start() {
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = -infinity<float>();
        sum[m][half] = 0.0f;
      }
    }
  }

  /// Scores become weights; out is rescaled where it has to be. `factor` > 0 makes exponents of 2
  /// of differences of scores.
  template <int kNTiles, int kOutTiles, typename Block>
  TORCH_EXT_DEVICE void update(Block& block, float (&scores)[kMTiles][kNTiles][4], float factor,
                               float (&out)[kMTiles][kOutTiles][4]) {
    float newest[kMTiles][2];
    bool grew = false;
    const float growth = min_of(kRescaleThreshold / factor, 1e30f);
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        float best = -infinity<float>();
        TORCH_EXT_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          best = max_of(best, max_of(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        best = max_of(best, block.shuffle_xor(best, 1));
        best = max_of(best, block.shuffle_xor(best, 2));
        newest[m][half] = best;
        const bool large = (best < 0.0f ? -best : best) * factor > kLargeExponent;
        grew |= best > maximum[m][half] + (large ? 0.0f : growth);
      }
    }
    // One decision for the warp, so that rows never depend on which thread holds them.
    if (block.any(grew)) {
      TORCH_EXT_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        TORCH_EXT_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float next = max_of(maximum[m][half], newest[m][half]);
          // A row that is masked so far: any finite reference serves, its sums are 0.
          const float shrink = next == -infinity<float>()
                                   ? 1.0f
                                   : block.exp2_fast((maximum[m][half] - next) * factor);
          maximum[m][half] = next;
          sum[m][half] *= shrink;
          TORCH_EXT_UNROLL
          for (int n = 0; n < kOutTiles; ++n) {
            out[m][n][2 * half] *= shrink;
            out[m][n][2 * half + 1] *= shrink;
          }
        }
      }
    }
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float reference = maximum[m][half] == -infinity<float>() ? 0.0f : maximum[m][half];
        TORCH_EXT_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          TORCH_EXT_UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const float weight = block.exp2_fast((scores[m][n][e] - reference) * factor);
            scores[m][n][e] = weight;
            sum[m][half] += weight;
          }
        }
      }
    }
  }

  /// Adds the quad's sums.
  template <typename Block>
  TORCH_EXT_DEVICE void finish(Block& block) {
    TORCH_EXT_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      TORCH_EXT_UNROLL
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += block.shuffle_xor(sum[m][half], 1);
        sum[m][half] += block.shuffle_xor(sum[m][half], 2);
      }
    }
  }
};

}  // namespace torch_ext::cuda
