// The kernels of a backward pass in their order; see attention_forward_launches.h.
#pragma once

#include "attention_backward_keys.cuh"
#include "attention_forward_launches.h"
#include "attention_mask_gradient.cuh"
#include "attention_scalar_backward.cuh"
#include "attention_score_gradients.cuh"
#include "attention_tile_row_stats.cuh"

namespace torch_ext::cuda {

template <typename Launcher>
struct BackwardLaunches {
  const CudaBackwardSchedule& schedule;
  const AttentionBackwardArgs& args;
  const Launcher& launcher;

  std::int64_t slices() const { return args.shape.batch * args.shape.query_heads; }
  std::int64_t pairs() const { return args.shape.batch * args.shape.kv_heads; }
  bool wants_keys() const {
    return args.grad_key.data != nullptr || args.grad_value.data != nullptr;
  }

  template <typename Program>
  void launch(std::int64_t blocks) const {
    static_assert(Program::kSharedBytes <= kLeastSharedLimit);
    launcher.template launch<Program>(blocks, args);
  }

  template <typename Program, typename T>
  void mask_gradient() const {
    if (args.grad_mask.data == nullptr) return;
    std::int64_t blocks =
        args.partials * args.mask_heads * args.mask_row_tiles * args.mask_column_tiles;
    std::int64_t count = args.mask_heads * args.mask_rows * args.mask_cols;
    for (const std::int64_t size : args.mask_batch_sizes) {
      blocks *= size;
      count *= size;
    }
    launch<Program>(blocks);
    if (args.partials > 1) launch<AttentionMaskSumProgram<T>>((count + 127) / 128);
  }

  /// Which the schedule has made sure of.
  template <typename Program>
  static constexpr std::size_t keys_limit() {
    if (Program::kDim != 128) return kLeastSharedLimit;
    if (std::is_same_v<typename Program::Element, Tf32>) return kTf32KeysBytes;
    return Program::kGeneral ? kLeastSharedLimit : kWideKeysBytes;
  }

  template <typename Program>
  void keys() const {
    static_assert(Program::kSharedBytes <= keys_limit<Program>());
    AttentionBackwardArgs own = args;
    own.tiles = (args.shape.kv_len + Program::kKeys - 1) / Program::kKeys;
    launcher.template launch<Program>(own.tiles * pairs(), own);
  }

  template <typename Element, int kDim>
  void tensor_core() const {
    constexpr bool kIsTf32 = std::is_same_v<Element, Tf32>;
    launch<AttentionTileRowStatsProgram<Element>>(
        slices() * (args.padded_rows / AttentionTileRowStatsProgram<Element>::kRows));
    if (wants_keys() || schedule.sums_grad_query) {
      if constexpr (kDim <= 128 && !kIsTf32) {
        if (schedule.general) {
          keys<AttentionBackwardKeysProgram<Element, kDim, true>>();
        } else {
          keys<AttentionBackwardKeysProgram<Element, kDim, false>>();
        }
      } else {
        keys<AttentionBackwardKeysProgram<Element, kDim, true>>();
      }
    }
    if (schedule.sums_grad_query) {
      AttentionBackwardArgs own = args;
      own.dim_chunks = kDim / 8;
      launcher.template launch<AttentionGradQuerySumProgram<Element>>(
          slices() * (args.padded_rows / 16), own);
    } else if (args.grad_query.data != nullptr) {
      using Program = AttentionGradQueryProgram<Element, kDim>;
      launch<Program>(slices() *
                      ((args.shape.q_len + Program::Tile::kRows - 1) / Program::Tile::kRows));
    }
    mask_gradient<AttentionMaskGradientProgram<Element, kDim>, float>();
  }

  template <typename Element, typename T>
  void scalar() const {
    using Tile = ScalarTile<Element, T>;
    const auto tiles = [](std::int64_t length) { return (length + Tile::kRows - 1) / Tile::kRows; };
    const auto chunks = [](std::int64_t cols) {
      return cols <= Tile::kOutCols ? 1 : (cols + Tile::kOutCols - 1) / Tile::kOutCols;
    };
    const DeviceShape& shape = args.shape;
    using RowStatsProgram = AttentionRowStatsProgram<Element, T>;
    launch<RowStatsProgram>((slices() * args.padded_rows + RowStatsProgram::kRowsPerBlock - 1) /
                            RowStatsProgram::kRowsPerBlock);
    if (wants_keys()) {
      launch<AttentionScalarGradKeysProgram<Element, T>>(
          tiles(shape.kv_len) * pairs() *
          chunks(shape.head_dim < shape.value_dim ? shape.value_dim : shape.head_dim));
    }
    if (args.grad_query.data != nullptr) {
      launch<AttentionScalarGradQueryProgram<Element, T>>(tiles(shape.q_len) * slices() *
                                                          chunks(shape.head_dim));
    }
    mask_gradient<AttentionScalarMaskGradientProgram<Element, T>, T>();
  }
};

/// `workspace` has schedule.total_bytes, aligned to 256. The launcher's clear(place, bytes) zeroes.
template <typename Launcher>
const char* launch_backward(const CudaBackwardSchedule& schedule, void* workspace,
                            const Launcher& launcher) {
  const AttentionBackwardArgs args = schedule.bound_args(workspace);
  launch_tile_map(args.shape, args.masking, launcher);
  if (schedule.sums_grad_query) launcher.clear(args.grad_query_sum, schedule.grad_query_sum_bytes);
  const BackwardLaunches<Launcher> launches{schedule, args, launcher};
  if (schedule.path == CudaPath::kTensorCore) {
    with_tile_type(schedule.dtype, [&](auto element) {
      using Element = decltype(element);
      if (schedule.dim == 64) {
        launches.template tensor_core<Element, 64>();
      } else if (schedule.dim == 128) {
        launches.template tensor_core<Element, 128>();
      } else if constexpr (!std::is_same_v<Element, Tf32>) {
        launches.template tensor_core<Element, 256>();
      }
    });
    if (schedule.dtype == ScalarType::kFloat32) return "cuda.tf32_tile";
    return schedule.general ? "cuda.masked_tile" : "cuda.tile";
  }
  switch (schedule.dtype) {
    case ScalarType::kFloat64:
      launches.template scalar<double, double>();
      break;
    case ScalarType::kFloat32:
      launches.template scalar<float, float>();
      break;
    default:
      with_half_type(schedule.dtype,
                     [&](auto element) { launches.template scalar<decltype(element), float>(); });
  }
  return "cuda.scalar";
}

}  // namespace torch_ext::cuda
