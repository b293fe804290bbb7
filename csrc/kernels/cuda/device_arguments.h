// Params of the host -> arguments of the device, what both passes share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device_attention.h"

namespace torch_ext::cuda {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::size_t align_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

inline DeviceShape device_shape(const AttentionShape& shape) {
  DeviceShape result{};
  std::copy_n(shape.batch_sizes.begin(), kMaxBatchDims, result.batch_sizes);
  result.batch = shape.batch();
  result.query_heads = shape.query_heads;
  result.kv_heads = shape.kv_heads;
  result.group = shape.group();
  result.q_len = shape.q_len;
  result.kv_len = shape.kv_len;
  result.head_dim = shape.head_dim;
  result.value_dim = shape.value_dim;
  return result;
}

/// `cols` of elements of `size` bytes.
template <typename View>
BasicDeviceView<decltype(View::data)> device_view(const View& view, std::int64_t cols,
                                                  std::size_t size) {
  BasicDeviceView<decltype(View::data)> result{};
  result.data = view.data;
  std::copy_n(view.batch_strides.begin(), kMaxBatchDims, result.batch_strides);
  result.head_stride = view.head_stride;
  result.row_stride = view.row_stride;
  result.col_stride = view.col_stride;
  const auto whole = [size](std::int64_t elements) {
    return elements * static_cast<std::int64_t>(size) % kCopyBytes == 0;
  };
  result.copies_whole_chunks = reinterpret_cast<std::uintptr_t>(view.data) % kCopyBytes == 0 &&
                               whole(cols) && (cols <= 1 || view.col_stride == 1) &&
                               whole(view.head_stride) && whole(view.row_stride);
  for (const std::int64_t stride : view.batch_strides) result.copies_whole_chunks &= whole(stride);
  return result;
}

inline DeviceMasking device_masking(const ScoreTransform& transform, const AttentionShape& shape) {
  DeviceMasking result{};
  result.kind = transform.mask.kind;
  result.mask_dtype = transform.mask.dtype;
  result.mask = device_view(transform.mask.view, 1, element_size(transform.mask.dtype));
  result.padding = device_view(transform.key_padding, 1, 1);
  const KeyWindow& window = transform.window;
  result.is_causal = window.bounds_right();
  // Beyond these nothing, or everything, is allowed.
  result.causal_offset =
      std::clamp(extent::saturating_add(window.offset, window.right), -shape.q_len, shape.kv_len);
  return result;
}

/// The map of a call that masks pairs or keys; its bits are at no place yet. Returns its bytes.
inline std::size_t set_up_tile_map(DeviceMasking& masking, const AttentionShape& shape) {
  const bool boolean = masking.kind == AttentionMaskKind::kBoolean;
  if (!boolean && masking.padding.data == nullptr) return 0;
  TileMap& map = masking.map;
  map.column_tiles = ceil_div(shape.kv_len, kMapTile);
  const bool rows_vary = boolean && masking.mask.row_stride != 0;
  map.row_tiles = rows_vary ? ceil_div(shape.q_len, kMapTile) : 1;
  map.row_stride = rows_vary ? map.column_tiles : 0;
  map.entries = map.row_tiles * map.column_tiles;
  const auto add = [&map](bool varies, std::int64_t size, std::int64_t& own, std::int64_t& stride) {
    own = varies ? size : 1;
    stride = varies ? map.entries : 0;
    map.entries *= own;
  };
  add(boolean && masking.mask.head_stride != 0, shape.query_heads, map.heads, map.head_stride);
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    const bool varies =
        (boolean && masking.mask.batch_strides[dim] != 0) ||
        (masking.padding.data != nullptr && masking.padding.batch_strides[dim] != 0);
    add(varies, shape.batch_sizes[dim], map.batch_sizes[dim], map.batch_strides[dim]);
  }
  return align_up(static_cast<std::size_t>(map.entries));
}

inline DeviceDropout device_dropout(const AttentionDropout& dropout) {
  DeviceDropout result{};
  result.active = dropout.probability > 0.0;
  result.threshold = result.active ? dropout_threshold(dropout.probability) : 0;
  result.scale = result.active ? dropout_scale(result.threshold) : 1.0;
  result.seed = dropout.seed;
  return result;
}

/// The narrowest tile that takes both; 0: none does.
inline int tile_dim(const AttentionShape& shape) {
  const std::int64_t dim = std::max(shape.head_dim, shape.value_dim);
  for (const int candidate : {64, 128, 256}) {
    if (dim <= candidate) return candidate;
  }
  return 0;
}

inline bool is_half(ScalarType type) {
  return type == ScalarType::kBFloat16 || type == ScalarType::kFloat16;
}

/// Float operands may be rounded to TF32; wider tiles of them are more than shared memory holds.
inline bool takes_tf32(ScalarType type, int dim, bool allow_tf32) {
  return allow_tf32 && type == ScalarType::kFloat32 && dim <= 128;
}

/// Positions of tensor core tiles are 32-bit.
inline bool positions_fit(const AttentionShape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  return shape.q_len * shape.group() < kMost && shape.kv_len < kMost;
}

template <typename View>
bool has_unit_columns(const View& view, std::int64_t cols) {
  return cols <= 1 || view.col_stride == 1;
}

}  // namespace torch_ext::cuda
