#include "kernels/cpu/attention_mask_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "attention_case.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr TileGeometry kGeometry{.lanes = 8, .max_vectors = 3, .compute_size = 4, .depth = 1};

struct TileContents {
  bool any_true = false;
  bool any_false = false;
};

/// What the mask holds for the queries of a tile, all heads of a group and the tile's keys.
TileContents contents(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head,
                      std::int64_t first_query, std::int64_t last_query, std::int64_t first_key,
                      std::int64_t end_key) {
  TileContents result;
  const std::int64_t group = problem.shape.group();
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t query = first_query; query <= last_query; ++query) {
      for (std::int64_t key = first_key; key < end_key; ++key) {
        (problem.mask.get(batch, head, query, key) != 0.0 ? result.any_true : result.any_false) =
            true;
      }
    }
  }
  return result;
}

void expect_classes(const AttentionProblem& problem, const MaskMapPlan& plan,
                    std::int64_t rows_per_query, const TaskRunner& runner) {
  SCOPED_TRACE(describe(problem.spec));
  const AttentionShape& shape = problem.shape;
  ASSERT_TRUE(plan.used);
  std::vector<TileClass> map(
      static_cast<std::size_t>(plan.slices * plan.row_tiles * plan.column_tiles),
      static_cast<TileClass>(77));
  build_mask_map(problem.forward_params().transform.mask, shape, plan, rows_per_query, runner,
                 map.data());
  const std::int64_t rows = shape.q_len * rows_per_query;
  std::vector<bool> seen(static_cast<std::size_t>(plan.slices));
  for (std::int64_t batch = 0; batch < shape.batch(); ++batch) {
    for (std::int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
      const std::int64_t slice = mask_map_slice(plan, shape, batch, kv_head);
      ASSERT_GE(slice, 0);
      ASSERT_LT(slice, plan.slices);
      seen[static_cast<std::size_t>(slice)] = true;
      for (std::int64_t row_tile = 0; row_tile * plan.row_tile < rows; ++row_tile) {
        const std::int64_t stored_tile = plan.row_tiles == 1 ? 0 : row_tile;
        ASSERT_LT(stored_tile, plan.row_tiles);
        const std::int64_t first_query = row_tile * plan.row_tile / rows_per_query;
        const std::int64_t last_query =
            std::min((row_tile + 1) * plan.row_tile - 1, rows - 1) / rows_per_query;
        for (std::int64_t column_tile = 0; column_tile < plan.column_tiles; ++column_tile) {
          const std::int64_t first_key = column_tile * plan.column_tile;
          const TileContents expected =
              contents(problem, batch, kv_head, first_query, last_query, first_key,
                       std::min(first_key + plan.column_tile, shape.kv_len));
          const TileClass actual = map[static_cast<std::size_t>(
              (slice * plan.row_tiles + stored_tile) * plan.column_tiles + column_tile)];
          ASSERT_EQ(actual, expected.any_true && expected.any_false ? TileClass::kMixed
                            : expected.any_true                     ? TileClass::kFull
                                                                    : TileClass::kEmpty)
              << "batch " << batch << " kv_head " << kv_head << " tile " << row_tile << ", "
              << column_tile;
        }
      }
    }
  }
  EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](bool used) { return used; }))
      << "classes that no pair reads";
}

void expect_classes(const AttentionProblem& problem) {
  const ThreadTaskRunner runner(3);
  const std::int64_t group = problem.shape.group();
  expect_classes(problem, plan_forward(problem.forward_params(), kGeometry, 1).mask_map, group,
                 runner);
  expect_classes(problem, plan_backward(problem.backward_params(), kGeometry, 1).mask_map, 1,
                 runner);
}

AttentionCase boolean_case() {
  return {.batch_sizes = {2, 1, 3, 1},
          .query_heads = 4,
          .kv_heads = 2,
          .q_len = 100,
          .kv_len = 150,
          .head_dim = 8,
          .mask = {.kind = AttentionMaskKind::kBoolean, .pattern = MaskPattern::kBlocks}};
}

TEST(MaskMap, PatternsAndLayouts) {
  for (const MaskPattern pattern :
       {MaskPattern::kRandom, MaskPattern::kFull, MaskPattern::kEmpty, MaskPattern::kWindow,
        MaskPattern::kBlocks, MaskPattern::kHalfRows}) {
    for (const Layout layout : {Layout::kBhsd, Layout::kTransposed, Layout::kEverySecondCol,
                                Layout::kSbhd, Layout::kExpandedAll}) {
      AttentionCase spec = boolean_case();
      spec.mask.pattern = pattern;
      spec.mask.layout = layout;
      expect_classes(AttentionProblem(spec));
    }
  }
}

TEST(MaskMap, EveryBroadcast) {
  for (int bits = 0; bits < 128; ++bits) {
    AttentionCase spec = boolean_case();
    spec.mask.density = 0.5;
    spec.mask.broadcast = {
        .heads = (bits & 1) != 0,
        .rows = (bits & 2) != 0,
        .cols = (bits & 4) != 0,
        .batch_dims = {(bits & 8) != 0, (bits & 16) != 0, (bits & 32) != 0, (bits & 64) != 0}};
    expect_classes(AttentionProblem(spec));
  }
}

TEST(MaskMap, LengthsAroundTiles) {
  for (const std::int64_t q_len : {1, 2, 5, 11, 12, 13, 24, 25, 64, 65}) {
    for (const std::int64_t kv_len : {1, 63, 64, 65, 129}) {
      for (const std::int64_t query_heads : {2, 6}) {
        AttentionCase spec = boolean_case();
        spec.query_heads = query_heads;
        spec.q_len = q_len;
        spec.kv_len = kv_len;
        spec.mask.density = 0.5;
        expect_classes(AttentionProblem(spec));
      }
    }
  }
}

TEST(MaskMap, AnyByteButZeroIsTrue) {
  AttentionCase spec = boolean_case();
  spec.mask.pattern = MaskPattern::kFull;
  AttentionProblem problem(spec);
  auto* bytes = static_cast<std::uint8_t*>(problem.mask.view().data);
  for (int i = 0; i < 1000; ++i) bytes[i] = static_cast<std::uint8_t>(i % 255 + 1);
  bytes[1200] = 0;
  expect_classes(problem);
}

TEST(MaskMap, BroadcastMasksAreClassifiedOnce) {
  AttentionCase spec = boolean_case();
  spec.mask.broadcast = {.batch = true, .heads = true};
  const AttentionProblem problem(spec);
  EXPECT_EQ(plan_forward(problem.forward_params(), kGeometry, 1).mask_map.slices, 1);
  EXPECT_EQ(plan_backward(problem.backward_params(), kGeometry, 1).mask_map.slices, 1);
}

}  // namespace
}  // namespace torch_ext::testing
