#include <algorithm>
#include <cmath>

#include "cuda_attention_schedule.h"
#include "device_arguments.h"

namespace torch_ext::cuda {
namespace {

// Blocks that fill the GPUs there are: 132 units with two blocks each.
constexpr std::int64_t kEnoughBlocks = 256;

// Keys of a split, at least: joining costs as much as reading some.
constexpr std::int64_t kLeastSplit = 256;

// Packed rows that one warp's tile takes.
constexpr std::int64_t kDecodeRows = 16;

int tensor_core_rows(int dim, bool general) { return dim <= (general ? 64 : 128) ? 128 : 64; }

void split_keys(CudaForwardSchedule& schedule, std::int64_t tasks) {
  AttentionForwardArgs& args = schedule.args;
  const std::int64_t kv_len = args.shape.kv_len;
  args.splits = 1;
  if (tasks < kEnoughBlocks / 2) {
    args.splits = std::clamp(kEnoughBlocks / std::max<std::int64_t>(tasks, 1), std::int64_t{1},
                             std::max<std::int64_t>(kv_len / kLeastSplit, 1));
  }
  args.split_len = ceil_div(ceil_div(kv_len, args.splits), kMapTile) * kMapTile;
  args.splits = ceil_div(kv_len, args.split_len);
}

}  // namespace

CudaForwardSchedule schedule_forward(const AttentionForwardParams& params, bool allow_tf32) {
  const AttentionShape& shape = params.shape;
  CudaForwardSchedule schedule;
  schedule.dtype = params.dtype;
  AttentionForwardArgs& args = schedule.args;
  const std::size_t size = element_size(params.dtype);
  args.shape = device_shape(shape);
  args.query = device_view(params.query, shape.head_dim, size);
  args.key = device_view(params.key, shape.head_dim, size);
  args.value = device_view(params.value, shape.value_dim, size);
  args.out = device_view(params.out, shape.value_dim, size);
  args.logsumexp = params.logsumexp;
  args.scale = params.transform.scale;
  args.masking = device_masking(params.transform, shape);
  args.dropout = device_dropout(params.dropout);
  args.pack = 1;
  args.splits = 1;
  args.unit = 1.0;
  args.split_len = ceil_div(std::max<std::int64_t>(shape.kv_len, 1), kMapTile) * kMapTile;
  if (shape.batch() * shape.query_heads * shape.q_len * shape.kv_len == 0) {
    schedule.path = CudaPath::kEmpty;
    return schedule;
  }

  schedule.map_offset = 0;
  schedule.total_bytes = set_up_tile_map(args.masking, shape);
  schedule.dim = tile_dim(shape);
  const bool tf32 = takes_tf32(params.dtype, schedule.dim, allow_tf32);
  const bool tensor_core = (is_half(params.dtype) || tf32) && schedule.dim != 0 &&
                           positions_fit(shape) && has_unit_columns(params.query, shape.head_dim) &&
                           has_unit_columns(params.key, shape.head_dim) &&
                           has_unit_columns(params.value, shape.value_dim);
  if (!tensor_core) {
    schedule.path = CudaPath::kScalar;
    const std::int64_t rows = params.dtype == ScalarType::kFloat64 ? 32 : 64;
    args.row_tiles = ceil_div(shape.q_len, rows);
    const std::int64_t chunks = std::max<std::int64_t>(ceil_div(shape.value_dim, 128), 1);
    schedule.blocks = args.row_tiles * shape.batch() * shape.query_heads * chunks;
    return schedule;
  }

  schedule.path = CudaPath::kTensorCore;
  const float factor = static_cast<float>(params.transform.scale) * 1.4426950408889634f;
  schedule.general = tf32 || schedule.dim > 128 || args.masking.kind != AttentionMaskKind::kNone ||
                     args.masking.padding.data != nullptr || args.dropout.active ||
                     !(factor > 0.0f && std::isfinite(factor)) || !args.query.copies_whole_chunks ||
                     !args.key.copies_whole_chunks || !args.value.copies_whole_chunks;
  if (!schedule.general) args.unit = params.transform.scale;
  // The grouped heads of few queries share a tile: their keys are read once.
  if (shape.q_len * shape.group() <= 64) args.pack = shape.group();
  schedule.decode = shape.q_len * args.pack <= kDecodeRows;
  if (schedule.decode) args.unit = 1.0;
  const std::int64_t tile_rows =
      schedule.decode ? kDecodeRows : tensor_core_rows(schedule.dim, schedule.general);
  args.row_tiles = ceil_div(args.rows(), tile_rows);
  split_keys(schedule, args.row_tiles * args.slices());
  schedule.blocks = args.row_tiles * args.slices() * args.splits;
  if (args.splits > 1) {
    const std::size_t rows = static_cast<std::size_t>(args.splits * args.slices() * args.rows());
    schedule.partial_out_offset = schedule.total_bytes;
    schedule.partial_stats_offset =
        schedule.partial_out_offset +
        align_up(rows * static_cast<std::size_t>(shape.value_dim) * sizeof(float));
    schedule.total_bytes = schedule.partial_stats_offset + align_up(rows * 2 * sizeof(float));
  }
  return schedule;
}

AttentionForwardArgs CudaForwardSchedule::bound_args(void* workspace) const {
  AttentionForwardArgs bound = args;
  char* base = static_cast<char*>(workspace);
  if (bound.masking.map.entries > 0) {
    bound.masking.map.bits = reinterpret_cast<std::uint8_t*>(base + map_offset);
  }
  if (bound.splits > 1) {
    bound.partial_out = base + partial_out_offset;
    bound.partial_stats = base + partial_stats_offset;
  }
  return bound;
}

}  // namespace torch_ext::cuda
