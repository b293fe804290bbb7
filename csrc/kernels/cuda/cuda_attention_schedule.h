// How one attention call is cut into blocks on a GPU, and where its scratch memory lies. Every rule
// depends on shapes only, so results are bitwise the same on every GPU of an architecture.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device_attention.h"

namespace torch_ext::cuda {

enum class CudaPath : std::uint8_t {
  kEmpty,       // nothing is attended to: out is 0
  kTensorCore,  // bf16, fp16, head_dim and value_dim up to 256; fp32 as TF32 up to 128
  kScalar       // fp32, fp64, wider heads
};

/// Shared memory of a block that every GPU from 8.0 on has (8.6, 8.9, 12.0: no more), in bytes.
inline constexpr std::size_t kLeastSharedLimit = 99 * 1024;
/// More than that takes the pass over the keys at head_dim 128, without options,
inline constexpr std::size_t kWideKeysBytes = 148 * 1024;
/// and in TF32.
inline constexpr std::size_t kTf32KeysBytes = 124 * 1024;

/// Widths that the tensor core tiles are compiled for.
inline constexpr int kTileDims[] = {64, 128, 256};

struct CudaForwardSchedule {
  CudaPath path = CudaPath::kScalar;
  ScalarType dtype = ScalarType::kFloat32;
  int dim = 0;           // of kTileDims
  bool general = false;  // masks, dropout, TF32 and so on: AttentionForwardProgram's kGeneral
  bool decode = false;   // few rows: warps share the keys
  std::int64_t blocks = 0;
  AttentionForwardArgs args{};  // without workspace
  std::size_t map_offset = 0;
  std::size_t partial_out_offset = 0;
  std::size_t partial_stats_offset = 0;
  std::size_t total_bytes = 0;

  /// The arguments of the kernels with their places in `workspace`.
  AttentionForwardArgs bound_args(void* workspace) const;
};

/// allow_tf32: products of fp32 may be rounded to TF32, for tensor cores.
CudaForwardSchedule schedule_forward(const AttentionForwardParams& params, bool allow_tf32 = false);

/// What the backward pass leaves to the caller.
struct CudaBackwardOptions {
  bool deterministic = false;    // the order in which dQ is summed up
  std::size_t shared_limit = 0;  // bytes that a block may have
  bool allow_tf32 = false;
};

struct CudaBackwardSchedule {
  CudaPath path = CudaPath::kScalar;
  ScalarType dtype = ScalarType::kFloat32;
  int dim = 0;
  bool general = false;
  bool sums_grad_query = false;  // dQ by atomic additions in the pass over the keys
  AttentionBackwardArgs args{};
  std::size_t map_offset = 0;
  std::size_t row_stats_offset = 0;
  std::size_t grad_query_sum_offset = 0;
  std::size_t grad_query_sum_bytes = 0;
  std::size_t mask_partial_offset = 0;
  std::size_t total_bytes = 0;

  AttentionBackwardArgs bound_args(void* workspace) const;
};

CudaBackwardSchedule schedule_backward(const AttentionBackwardParams& params,
                                       const CudaBackwardOptions& options);

}  // namespace torch_ext::cuda
