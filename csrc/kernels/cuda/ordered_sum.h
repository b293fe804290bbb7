// Sums over the threads of a block in an order that depends on nothing: three phases with barriers
// between them (phase(0), sync, phase(1), sync, phase(2)), so that the host can run them one after
// the other.
#pragma once

#include "device_program.h"

namespace torch_ext::cuda {

/// Squares summed up so far. Of fp64 beyond 1e154 they overflow: then the sum of the squares of
/// everything 2^-540 times as large counts. What vanishes by that is too small to show beside what
/// did not fit.
struct SquareSum {
  double sum;
  double downscaled;
  double not_finite;  // > 0: an element was infinite or NaN

  TORCH_EXT_DEVICE void add(const SquareSum& other) {
    sum += other.sum;
    downscaled += other.downscaled;
    not_finite += other.not_finite;
  }
};

inline constexpr double kDownscale = 0x1p-540;
inline constexpr double kUpscale = 0x1p540;

/// Of kThreads values. `values` and `folded` are shared memory.
template <int kThreads>
struct BlockSum {
  static constexpr int kFolders = 16;
  static_assert(kThreads % kFolders == 0);

  TORCH_EXT_DEVICE static void put(int thread, const SquareSum& own, SquareSum* values) {
    values[thread] = own;
  }

  TORCH_EXT_DEVICE static void fold(int thread, const SquareSum* values, SquareSum* folded) {
    if (thread >= kFolders) return;
    SquareSum sum = values[thread];
    for (int i = thread + kFolders; i < kThreads; i += kFolders) sum.add(values[i]);
    folded[thread] = sum;
  }

  /// For one thread.
  TORCH_EXT_DEVICE static SquareSum total(const SquareSum* folded) {
    SquareSum sum = folded[0];
    for (int i = 1; i < kFolders; ++i) sum.add(folded[i]);
    return sum;
  }
};

}  // namespace torch_ext::cuda
