#include <algorithm>
#include <cmath>

#include "cuda_attention_schedule.h"
#include "device_arguments.h"

namespace torch_ext::cuda {
namespace {

// Blocks of the mask's gradient below which its sums are cut into parts.
constexpr std::int64_t kEnoughBlocks = 256;

// Returns the bytes of the partial sums.
std::size_t set_up_mask_gradient(const CudaBackwardSchedule& schedule, const AttentionShape& shape,
                                 AttentionBackwardArgs& args) {
  const DeviceOutput& mask = args.grad_mask;
  const bool tensor_core = schedule.path == CudaPath::kTensorCore;
  const std::int64_t rows = schedule.dtype == ScalarType::kFloat64 ? 32 : 64;
  const std::size_t row_bytes =
      static_cast<std::size_t>(schedule.dim) * element_size(schedule.dtype);
  const std::int64_t cols = tensor_core && row_bytes > 256 ? 32 : rows;
  const std::int64_t row_tiles = ceil_div(shape.q_len, rows);
  const std::int64_t column_tiles = ceil_div(shape.kv_len, cols);
  args.shares = 1;
  const auto own = [&args](bool broadcast, std::int64_t size, std::int64_t shares) {
    if (broadcast) args.shares *= shares;
    return broadcast ? std::int64_t{1} : size;
  };
  args.mask_row_tiles = own(mask.row_stride == 0, row_tiles, row_tiles);
  args.mask_column_tiles = own(mask.col_stride == 0, column_tiles, column_tiles);
  args.mask_rows = mask.row_stride == 0 ? 1 : shape.q_len;
  args.mask_cols = mask.col_stride == 0 ? 1 : shape.kv_len;
  args.mask_heads = own(mask.head_stride == 0, shape.query_heads, shape.query_heads);
  std::int64_t tiles = args.mask_row_tiles * args.mask_column_tiles * args.mask_heads;
  std::int64_t count = args.mask_heads * args.mask_rows * args.mask_cols;
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    const std::int64_t size = shape.batch_sizes[dim];
    args.mask_batch_sizes[dim] = own(mask.batch_strides[dim] == 0, size, size);
    tiles *= args.mask_batch_sizes[dim];
    count *= args.mask_batch_sizes[dim];
  }
  args.partials = std::clamp(kEnoughBlocks / tiles, std::int64_t{1}, args.shares);
  const std::size_t size = schedule.dtype == ScalarType::kFloat64 ? 8 : 4;
  return args.partials == 1 ? 0 : align_up(static_cast<std::size_t>(args.partials * count) * size);
}

}  // namespace

CudaBackwardSchedule schedule_backward(const AttentionBackwardParams& params,
                                       const CudaBackwardOptions& options) {
  const AttentionShape& shape = params.shape;
  CudaBackwardSchedule schedule;
  schedule.dtype = params.dtype;
  AttentionBackwardArgs& args = schedule.args;
  const std::size_t size = element_size(params.dtype);
  args.shape = device_shape(shape);
  args.query = device_view(params.query, shape.head_dim, size);
  args.key = device_view(params.key, shape.head_dim, size);
  args.value = device_view(params.value, shape.value_dim, size);
  args.out = device_view(params.out, shape.value_dim, size);
  args.grad_out = device_view(params.grad_out, shape.value_dim, size);
  args.logsumexp = params.logsumexp;
  args.grad_logsumexp = params.grad_logsumexp;
  const std::size_t grad_size = element_size(gradient_type(params));
  args.grad_query = device_view(params.grad_query, shape.head_dim, grad_size);
  args.grad_key = device_view(params.grad_key, shape.head_dim, grad_size);
  args.grad_value = device_view(params.grad_value, shape.value_dim, grad_size);
  args.unrounded_grads = gradient_type(params) != params.dtype;
  args.grad_mask = device_view(params.grad_mask, 1, size);
  args.scale = params.transform.scale;
  args.masking = device_masking(params.transform, shape);
  args.dropout = device_dropout(params.dropout);
  if (shape.batch() * shape.query_heads * shape.q_len * shape.kv_len == 0) {
    schedule.path = CudaPath::kEmpty;
    return schedule;
  }

  schedule.total_bytes = set_up_tile_map(args.masking, shape);
  schedule.dim = tile_dim(shape);
  const bool tf32 = takes_tf32(params.dtype, schedule.dim, options.allow_tf32) &&
                    (schedule.dim <= 64 || options.shared_limit >= kTf32KeysBytes);
  const bool tensor_core = (is_half(params.dtype) || tf32) && schedule.dim != 0 &&
                           positions_fit(shape) && has_unit_columns(params.query, shape.head_dim) &&
                           has_unit_columns(params.key, shape.head_dim) &&
                           has_unit_columns(params.value, shape.value_dim) &&
                           has_unit_columns(params.out, shape.value_dim) &&
                           has_unit_columns(params.grad_out, shape.value_dim);
  schedule.path = tensor_core ? CudaPath::kTensorCore : CudaPath::kScalar;
  const std::size_t compute = params.dtype == ScalarType::kFloat64 ? 8 : 4;
  const std::size_t slices = static_cast<std::size_t>(shape.batch() * shape.query_heads);
  args.padded_rows = ceil_div(shape.q_len, 64) * 64;
  schedule.row_stats_offset = schedule.total_bytes;
  schedule.total_bytes +=
      align_up(slices * kRowStats * static_cast<std::size_t>(args.padded_rows) * compute);
  if (tensor_core) {
    schedule.general = tf32 || schedule.dim > 128 ||
                       args.masking.kind != AttentionMaskKind::kNone ||
                       args.masking.padding.data != nullptr || args.dropout.active ||
                       !args.query.copies_whole_chunks || !args.key.copies_whole_chunks ||
                       !args.value.copies_whole_chunks || !args.grad_out.copies_whole_chunks ||
                       (schedule.dim == 128 && options.shared_limit < kWideKeysBytes);
    schedule.sums_grad_query = params.grad_query.data != nullptr && !options.deterministic;
    if (schedule.sums_grad_query) {
      schedule.grad_query_sum_offset = schedule.total_bytes;
      schedule.grad_query_sum_bytes = slices * static_cast<std::size_t>(args.padded_rows) *
                                      static_cast<std::size_t>(schedule.dim) * sizeof(float);
      schedule.total_bytes += align_up(schedule.grad_query_sum_bytes);
    }
  }
  if (params.grad_mask.data != nullptr) {
    schedule.mask_partial_offset = schedule.total_bytes;
    schedule.total_bytes += set_up_mask_gradient(schedule, shape, args);
  }
  return schedule;
}

AttentionBackwardArgs CudaBackwardSchedule::bound_args(void* workspace) const {
  AttentionBackwardArgs bound = args;
  char* base = static_cast<char*>(workspace);
  if (bound.masking.map.entries > 0) {
    bound.masking.map.bits = reinterpret_cast<std::uint8_t*>(base + map_offset);
  }
  bound.row_stats = base + row_stats_offset;
  if (sums_grad_query) {
    bound.grad_query_sum = reinterpret_cast<float*>(base + grad_query_sum_offset);
  }
  if (bound.partials > 1) bound.mask_partial = base + mask_partial_offset;
  return bound;
}

}  // namespace torch_ext::cuda
