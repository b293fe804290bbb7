#include "kernels/cpu/attention_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace torch_ext::testing {
namespace {

/// Of AVX-512 pairs, AVX-512, AVX2, the baseline, and double on each.
constexpr TileGeometry kGeometries[] = {
    {.lanes = 16, .max_vectors = 2, .compute_size = 4, .depth = 2},
    {.lanes = 16, .max_vectors = 2, .compute_size = 4, .depth = 1},
    {.lanes = 8, .max_vectors = 3, .compute_size = 4, .depth = 1},
    {.lanes = 4, .max_vectors = 3, .compute_size = 4, .depth = 1},
    {.lanes = 8, .max_vectors = 2, .compute_size = 8, .depth = 1},
    {.lanes = 4, .max_vectors = 3, .compute_size = 8, .depth = 1},
    {.lanes = 2, .max_vectors = 3, .compute_size = 8, .depth = 1}};

std::vector<AttentionShape> shapes() {
  std::vector<AttentionShape> result;
  for (const std::int64_t batch : {0, 1, 3, 70}) {
    for (const auto& [query_heads, kv_heads] : {std::pair{1, 1}, {8, 8}, {8, 2}, {40, 1}, {0, 0}}) {
      for (const std::int64_t q_len : {0, 1, 2, 4, 5, 31, 64, 1000, 4096}) {
        for (const std::int64_t kv_len : {0, 1, 63, 64, 65, 511, 513, 1024, 5000, 40000}) {
          for (const std::int64_t head_dim : {0, 1, 64, 80, 512}) {
            result.push_back({.batch_sizes = {1, batch, 2, 1},
                              .query_heads = query_heads,
                              .kv_heads = kv_heads,
                              .q_len = q_len,
                              .kv_len = kv_len,
                              .head_dim = head_dim,
                              .value_dim = head_dim == 80 ? 16 : head_dim});
          }
        }
      }
    }
  }
  return result;
}

ConstStridedView contiguous_columns() {
  ConstStridedView view;
  view.col_stride = 1;
  return view;
}

AttentionForwardParams forward_params(const AttentionShape& shape) {
  return {.shape = shape, .key = contiguous_columns(), .value = contiguous_columns()};
}

std::string describe_shape(const AttentionShape& shape) {
  return "batch " + std::to_string(shape.batch()) + " heads " + std::to_string(shape.query_heads) +
         "/" + std::to_string(shape.kv_heads) + " q_len " + std::to_string(shape.q_len) +
         " kv_len " + std::to_string(shape.kv_len) + " head_dim " + std::to_string(shape.head_dim);
}

/// ceil(total / part) == parts, where parts may be 1 for nothing.
::testing::AssertionResult covers(std::int64_t total, std::int64_t part, std::int64_t parts) {
  if (part <= 0 && total > 0) return ::testing::AssertionFailure() << "parts of " << part;
  if (parts * part < total) return ::testing::AssertionFailure() << total << " is not covered";
  if (parts > 1 && (parts - 1) * part >= total) {
    return ::testing::AssertionFailure() << "the last of " << parts << " parts is empty";
  }
  return ::testing::AssertionSuccess();
}

TEST(ForwardPlan, SplitsCoverTheKeysOfAWindow) {
  for (const TileGeometry& geometry : kGeometries) {
    for (const AttentionShape& shape : shapes()) {
      if (shape.batch() * shape.query_heads * shape.q_len == 0) continue;
      SCOPED_TRACE(describe_shape(shape));
      for (const KeyWindow& window : {KeyWindow{.right = 0}, KeyWindow{.left = 100, .right = 30},
                                      KeyWindow{.left = 700, .offset = 3000}}) {
        AttentionForwardParams params = forward_params(shape);
        params.transform.window = window;
        const ForwardPlan plan = plan_forward(params, geometry, 1);
        for (std::int64_t tile = 0; tile < plan.row_tiles; ++tile) {
          const Range keys = plan.keys_of_row_tile(params, tile);
          const std::int64_t first = tile * plan.super_tile / shape.group();
          const std::int64_t last =
              (std::min((tile + 1) * plan.super_tile, plan.rows) - 1) / shape.group();
          const Range seen = keys_of_any(window, {first, last + 1}, shape.kv_len);
          ASSERT_LE(keys.begin, seen.begin);
          ASSERT_EQ(keys.end, seen.end);
          // Each split begins where the one before ends.
          std::int64_t end = keys.begin;
          for (std::int64_t split = 0; split < plan.kv_splits; ++split) {
            const Range part = plan.keys_of_task(params, tile, split);
            ASSERT_EQ(part.begin % plan.kv_block, 0);
            if (part.empty()) continue;
            ASSERT_EQ(part.begin, end);
            end = part.end;
          }
          ASSERT_EQ(end, keys.end < keys.begin ? keys.begin : keys.end);
        }
      }
    }
  }
}

TEST(ForwardPlan, CoversRowsAndKeys) {
  for (const TileGeometry& geometry : kGeometries) {
    for (const AttentionShape& shape : shapes()) {
      SCOPED_TRACE(describe_shape(shape));
      const ForwardPlan plan = plan_forward(forward_params(shape), geometry, 1);
      ASSERT_EQ(plan.pairs, shape.batch() * shape.kv_heads);
      ASSERT_EQ(plan.rows, shape.q_len * shape.group());
      ASSERT_TRUE(covers(shape.kv_len, plan.kv_split_len, plan.kv_splits));
      ASSERT_EQ(plan.kv_split_len % plan.kv_block, 0);
      if (plan.decode) {
        ASSERT_LE(plan.rows, kDecodeRows);
        ASSERT_GT(plan.rows, 0);
        ASSERT_EQ(plan.row_tiles, 1);
        continue;
      }
      ASSERT_TRUE(covers(plan.rows, plan.super_tile, plan.row_tiles));
      ASSERT_GT(plan.super_tile, 0);
      ASSERT_EQ(plan.super_tile % plan.sub_tile, 0);
      ASSERT_EQ(plan.sub_tile, geometry.lanes * geometry.max_vectors);
      ASSERT_LE(plan.super_tile, kMaxSubTiles * plan.sub_tile);
    }
  }
}

TEST(ForwardPlan, MakesEnoughTasks) {
  // One head and long keys: 32 workers have something to do, decoding or not.
  for (const TileGeometry& geometry : kGeometries) {
    for (const std::int64_t q_len : {1, 16}) {
      const AttentionShape shape{.q_len = q_len, .kv_len = 32768, .head_dim = 64, .value_dim = 64};
      const ForwardPlan plan = plan_forward(forward_params(shape), geometry, 1);
      EXPECT_GE(plan.pairs * plan.row_tiles * plan.kv_splits, 16);
    }
  }
}

TEST(ForwardPlan, DecodeNeedsContiguousColumnsAndNoDouble) {
  AttentionForwardParams params =
      forward_params({.q_len = 1, .kv_len = 100, .head_dim = 8, .value_dim = 8});
  EXPECT_TRUE(plan_forward(params, kGeometries[2], 1).decode);
  params.key.col_stride = 2;
  EXPECT_FALSE(plan_forward(params, kGeometries[2], 1).decode);
  params.key.col_stride = 1;
  params.value.col_stride = 0;
  EXPECT_FALSE(plan_forward(params, kGeometries[2], 1).decode);
  params.value.col_stride = 1;
  params.dtype = ScalarType::kFloat64;
  EXPECT_FALSE(plan_forward(params, kGeometries[5], 1).decode);
}

/// The same plan but for the workers' areas at its end.
template <typename Plan>
void expect_worker_areas_only(const Plan& one, const Plan& many, int num_workers) {
  ASSERT_EQ(one.worker_offset, many.worker_offset);
  ASSERT_EQ(one.worker_bytes, many.worker_bytes);
  ASSERT_EQ(one.worker_offset % 64, 0u);
  ASSERT_EQ(one.worker_bytes % 64, 0u);
  ASSERT_EQ(one.total_bytes, one.worker_offset + one.worker_bytes);
  ASSERT_EQ(many.total_bytes, one.worker_offset + num_workers * one.worker_bytes);
}

TEST(ForwardPlan, DependsOnShapesOnly) {
  for (const TileGeometry& geometry : kGeometries) {
    for (const AttentionShape& shape : shapes()) {
      SCOPED_TRACE(describe_shape(shape));
      const ForwardPlan one = plan_forward(forward_params(shape), geometry, 1);
      const ForwardPlan many = plan_forward(forward_params(shape), geometry, 64);
      expect_worker_areas_only(one, many, 64);
      ASSERT_EQ(one.row_tiles, many.row_tiles);
      ASSERT_EQ(one.super_tile, many.super_tile);
      ASSERT_EQ(one.kv_splits, many.kv_splits);
      ASSERT_EQ(one.kv_split_len, many.kv_split_len);
      ASSERT_EQ(one.decode, many.decode);
    }
  }
}

TEST(BackwardPlan, CoversKeysInWholeTiles) {
  for (const TileGeometry& geometry : kGeometries) {
    for (const AttentionShape& shape : shapes()) {
      SCOPED_TRACE(describe_shape(shape));
      const BackwardPlan plan = plan_backward({.shape = shape}, geometry, 1);
      ASSERT_TRUE(covers(shape.kv_len, plan.chunk_len, plan.chunks));
      ASSERT_GT(plan.key_tile, 0);
      ASSERT_EQ(plan.chunk_len % plan.key_tile, 0);
      // Dropout bits of 2 x 16 keys are made together on the widest instruction set.
      ASSERT_EQ(plan.key_tile % 32, 0);
      ASSERT_GT(plan.query_block, 0);
      ASSERT_EQ(plan.groups(), plan.pairs);
      ASSERT_EQ(plan.head_stride % geometry.lanes, 0);
      ASSERT_GE(plan.head_stride, shape.head_dim);
      const BackwardPlan many = plan_backward({.shape = shape}, geometry, 64);
      expect_worker_areas_only(plan, many, 64);
      ASSERT_EQ(plan.chunks, many.chunks);
      ASSERT_EQ(plan.chunk_len, many.chunk_len);
      ASSERT_EQ(plan.key_tile, many.key_tile);
      ASSERT_EQ(plan.query_block, many.query_block);
    }
  }
}

TEST(BackwardPlan, EachPairAddsToItsSliceOfTheMaskGradientOnce) {
  const AttentionShape shape{.batch_sizes = {2, 3, 1, 4},
                             .query_heads = 6,
                             .kv_heads = 3,
                             .q_len = 5,
                             .kv_len = 7,
                             .head_dim = 8,
                             .value_dim = 8};
  double storage = 0.0;
  for (int bits = 0; bits < 128; ++bits) {
    StridedView mask{.data = &storage};
    for (int dim = 0; dim < kMaxBatchDims; ++dim) {
      mask.batch_strides[dim] = bits >> dim & 1 ? 10 + dim : 0;
    }
    mask.head_stride = bits & 16 ? 3 : 0;
    mask.row_stride = bits & 32 ? 2 : 0;
    mask.col_stride = bits & 64 ? 1 : 0;
    const BackwardPlan plan = plan_backward({.shape = shape, .grad_mask = mask}, kGeometries[2], 1);
    ASSERT_TRUE(plan.mask_gradient);
    ASSERT_EQ(plan.mask_slices * plan.mask_shares, plan.pairs);
    ASSERT_EQ(plan.mask_rows, bits & 32 ? 5 : 1);
    ASSERT_EQ(plan.mask_cols, bits & 64 ? 7 : 1);
    ASSERT_EQ(plan.mask_heads, bits & 16 ? 2 : 1);
    ASSERT_GE(plan.mask_partials, 1);
    ASSERT_LE(plan.mask_partials, plan.mask_shares);
    ASSERT_EQ(plan.groups(), plan.mask_slices * plan.mask_partials);

    std::vector<int> visits(static_cast<std::size_t>(plan.pairs));
    for (std::int64_t slice = 0; slice < plan.mask_slices; ++slice) {
      std::int64_t offset = -1;
      for (std::int64_t index = 0; index < plan.mask_shares; ++index) {
        const std::int64_t pair = mask_sharing_pair(plan, shape, slice, index);
        ASSERT_GE(pair, 0);
        ASSERT_LT(pair, plan.pairs);
        ++visits[static_cast<std::size_t>(pair)];
        const std::int64_t place = slice_offset(mask, shape.batch_sizes, pair / shape.kv_heads,
                                                pair % shape.kv_heads * shape.group());
        if (index == 0) offset = place;
        ASSERT_EQ(place, offset) << "pairs of a slice have one place";
      }
    }
    for (const int count : visits) ASSERT_EQ(count, 1);
  }
}

TEST(BackwardPlan, HugeShapesDoNotOverflow) {
  const AttentionShape shape{.batch_sizes = {1, 1, 64, 64},
                             .query_heads = 128,
                             .kv_heads = 8,
                             .q_len = 1 << 17,
                             .kv_len = 1 << 17,
                             .head_dim = 256,
                             .value_dim = 256};
  for (const TileGeometry& geometry : kGeometries) {
    const BackwardPlan plan = plan_backward({.shape = shape}, geometry, 256);
    EXPECT_GT(plan.total_bytes, plan.worker_bytes);
    EXPECT_LT(plan.worker_bytes, std::size_t{1} << 36);
    const ForwardPlan forward = plan_forward(forward_params(shape), geometry, 256);
    EXPECT_LT(forward.total_bytes, std::size_t{1} << 34) << "no quadratic memory";
  }
}

}  // namespace
}  // namespace torch_ext::testing
