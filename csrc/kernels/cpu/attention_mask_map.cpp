#include "attention_mask_map.h"

#include <algorithm>

namespace torch_ext {
namespace {

// Bits gathered over the bytes of a tile.
constexpr std::uint8_t kHasTrue = 1;
constexpr std::uint8_t kHasFalse = 2;

std::uint8_t scan(const std::uint8_t* bytes, std::int64_t stride, std::int64_t count) {
  std::uint8_t any_true = 0;
  std::uint8_t any_false = 0;
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      any_true |= bytes[i];
      any_false |= static_cast<std::uint8_t>(bytes[i] == 0);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      any_true |= bytes[i * stride];
      any_false |= static_cast<std::uint8_t>(bytes[i * stride] == 0);
    }
  }
  return (any_true ? kHasTrue : 0) | (any_false ? kHasFalse : 0);
}

// Offset of the first head of a slice: the varying dimensions are the digits of the slice index.
std::int64_t slice_data_offset(const AttentionMask& mask, const AttentionShape& shape,
                               const MaskMapPlan& plan, std::int64_t slice) {
  std::int64_t offset = 0;
  if (plan.head_varies) {
    offset += slice % shape.kv_heads * shape.group() * mask.view.head_stride;
    slice /= shape.kv_heads;
  }
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    if (!plan.batch_varies[dim]) continue;
    offset += slice % shape.batch_sizes[dim] * mask.view.batch_strides[dim];
    slice /= shape.batch_sizes[dim];
  }
  return offset;
}

}  // namespace

std::int64_t mask_map_slice(const MaskMapPlan& plan, const AttentionShape& shape,
                            std::int64_t batch, std::int64_t kv_head) {
  std::int64_t slice = 0;
  std::int64_t digits = 1;
  if (plan.head_varies) {
    slice = kv_head;
    digits = shape.kv_heads;
  }
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    const std::int64_t index = batch % shape.batch_sizes[dim];
    batch /= shape.batch_sizes[dim];
    if (!plan.batch_varies[dim]) continue;
    slice += index * digits;
    digits *= shape.batch_sizes[dim];
  }
  return slice;
}

void build_mask_map(const AttentionMask& mask, const AttentionShape& shape, const MaskMapPlan& plan,
                    std::int64_t rows_per_query, const TaskRunner& runner, TileClass* map) {
  const auto* data = static_cast<const std::uint8_t*>(mask.view.data);
  const std::int64_t heads = plan.head_varies ? shape.group() : 1;
  run_tasks(runner, plan.slices * plan.row_tiles, [&](int, std::int64_t task) {
    const std::int64_t slice = task / plan.row_tiles;
    const std::int64_t tile = task % plan.row_tiles;
    std::int64_t first = tile * plan.row_tile / rows_per_query;
    std::int64_t last =
        std::min(((tile + 1) * plan.row_tile - 1) / rows_per_query, shape.q_len - 1);
    if (mask.view.row_stride == 0) first = last = 0;
    TileClass* classes = map + task * plan.column_tiles;
    auto* bits = reinterpret_cast<std::uint8_t*>(classes);
    std::fill_n(bits, plan.column_tiles, std::uint8_t{0});
    const std::uint8_t* base = data + slice_data_offset(mask, shape, plan, slice);
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t query = first; query <= last; ++query) {
        const std::uint8_t* row =
            base + head * mask.view.head_stride + query * mask.view.row_stride;
        for (std::int64_t column = 0; column < plan.column_tiles; ++column) {
          const std::int64_t key = column * plan.column_tile;
          bits[column] |= scan(row + key * mask.view.col_stride, mask.view.col_stride,
                               std::min(plan.column_tile, shape.kv_len - key));
        }
      }
    }
    for (std::int64_t column = 0; column < plan.column_tiles; ++column) {
      classes[column] = bits[column] == (kHasTrue | kHasFalse) ? TileClass::kMixed
                        : bits[column] == kHasTrue             ? TileClass::kFull
                                                               : TileClass::kEmpty;
    }
  });
}

}  // namespace torch_ext
