// The kernels of a forward pass in their order. Launcher::launch<Program>(blocks, args) runs one:
// on a stream (attention_cuda.cpp) or on the host, in the tests.
#pragma once

#include <type_traits>

#include "attention_combine.cuh"
#include "attention_decode_tile.cuh"
#include "attention_forward_tile.cuh"
#include "attention_scalar_forward.cuh"
#include "cuda_attention_schedule.h"
#include "tile_map.cuh"

namespace torch_ext::cuda {

template <typename Launcher>
void launch_tile_map(const DeviceShape& shape, const DeviceMasking& masking,
                     const Launcher& launcher) {
  if (masking.map.bits == nullptr) return;
  constexpr std::int64_t kPerBlock = TileMapProgram::kThreads / kWarpSize;
  launcher.template launch<TileMapProgram>((masking.map.entries + kPerBlock - 1) / kPerBlock,
                                           TileMapArgs{shape, masking});
}

/// Calls visit(element type) for a 16-bit type.
template <typename Visit>
void with_half_type(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::kBFloat16) {
    visit(Bf16{});
  } else {
    visit(Fp16{});
  }
}

/// ... or fp32, as TF32: the types of tensor core tiles.
template <typename Visit>
void with_tile_type(ScalarType dtype, const Visit& visit) {
  if (dtype == ScalarType::kFloat32) {
    visit(Tf32{});
  } else {
    with_half_type(dtype, visit);
  }
}

/// A tile's element as memory has it.
template <typename Element>
using StoredElement = std::conditional_t<std::is_same_v<Element, Tf32>, float, Element>;

template <typename Element, typename Launcher>
void launch_forward_tiles(const CudaForwardSchedule& schedule, const AttentionForwardArgs& args,
                          const Launcher& launcher) {
  constexpr bool kIsTf32 = std::is_same_v<Element, Tf32>;
  const auto tiles = [&]<int kDim>() {
    static_assert(AttentionDecodeProgram<Element, kDim>::kSharedBytes <= kLeastSharedLimit &&
                  AttentionForwardProgram<Element, kDim, true>::kSharedBytes <= kLeastSharedLimit);
    if (schedule.decode) {
      launcher.template launch<AttentionDecodeProgram<Element, kDim>>(schedule.blocks, args);
    } else if (kDim > 128 || schedule.general) {
      launcher.template launch<AttentionForwardProgram<Element, kDim, true>>(schedule.blocks, args);
    } else if constexpr (kDim <= 128 && !kIsTf32) {
      launcher.template launch<AttentionForwardProgram<Element, kDim, false>>(schedule.blocks,
                                                                              args);
    }
  };
  if (schedule.dim == 64) {
    tiles.template operator()<64>();
  } else if (schedule.dim == 128) {
    tiles.template operator()<128>();
  } else if constexpr (!kIsTf32) {
    tiles.template operator()<256>();
  }
  if (args.splits > 1) {
    launcher.template launch<AttentionCombineProgram<StoredElement<Element>, float>>(
        args.slices() * args.rows(), args);
  }
}

/// `workspace` has schedule.total_bytes, aligned to 256.
template <typename Launcher>
const char* launch_forward(const CudaForwardSchedule& schedule, void* workspace,
                           const Launcher& launcher) {
  const AttentionForwardArgs args = schedule.bound_args(workspace);
  launch_tile_map(args.shape, args.masking, launcher);
  if (schedule.path == CudaPath::kTensorCore) {
    with_tile_type(schedule.dtype, [&](auto element) {
      launch_forward_tiles<decltype(element)>(schedule, args, launcher);
    });
    if (schedule.dtype == ScalarType::kFloat32) {
      return schedule.decode ? "cuda.tf32_decode" : "cuda.tf32_tile";
    }
    return schedule.decode ? "cuda.decode" : schedule.general ? "cuda.masked_tile" : "cuda.tile";
  }
  switch (schedule.dtype) {
    case ScalarType::kFloat64:
      launcher.template launch<AttentionScalarForwardProgram<double, double>>(schedule.blocks,
                                                                              args);
      break;
    case ScalarType::kFloat32:
      launcher.template launch<AttentionScalarForwardProgram<float, float>>(schedule.blocks, args);
      break;
    default:
      with_half_type(schedule.dtype, [&](auto element) {
        launcher.template launch<AttentionScalarForwardProgram<decltype(element), float>>(
            schedule.blocks, args);
      });
  }
  return "cuda.scalar";
}

}  // namespace torch_ext::cuda
