#include "kernels/strided_view.h"

#include <gtest/gtest.h>

#include "kernels/attention_params.h"

namespace torch_ext {
namespace {

TEST(ElementSize, OfEveryType) {
  EXPECT_EQ(element_size(ScalarType::kFloat64), 8u);
  EXPECT_EQ(element_size(ScalarType::kFloat32), 4u);
  EXPECT_EQ(element_size(ScalarType::kBFloat16), 2u);
  EXPECT_EQ(element_size(ScalarType::kFloat16), 2u);
  EXPECT_EQ(element_size(ScalarType::kBool), 1u);
}

TEST(SliceOffset, IsRowMajorOverBatchSizes) {
  const std::array<std::int64_t, kMaxBatchDims> sizes{2, 3, 4, 5};
  const ConstStridedView view{.batch_strides = {1000003, 10007, 101, 7}, .head_stride = 3};
  std::int64_t batch = 0;
  for (std::int64_t a = 0; a < 2; ++a) {
    for (std::int64_t b = 0; b < 3; ++b) {
      for (std::int64_t c = 0; c < 4; ++c) {
        for (std::int64_t d = 0; d < 5; ++d, ++batch) {
          EXPECT_EQ(slice_offset(view, sizes, batch, 2),
                    a * 1000003 + b * 10007 + c * 101 + d * 7 + 6);
        }
      }
    }
  }
}

TEST(SliceOffset, BroadcastsAndRunsBackwards) {
  const std::array<std::int64_t, kMaxBatchDims> sizes{1, 1, 3, 4};
  const StridedView view{.batch_strides = {9, 9, 0, -20}, .head_stride = -1};
  EXPECT_EQ(slice_offset(view, sizes, 0, 0), 0);
  EXPECT_EQ(slice_offset(view, sizes, 7, 5), -60 - 5);
  EXPECT_EQ(slice_offset(view, sizes, 11, 0), -60);
}

TEST(SliceOffset, ReachesBeyondFourGigabytes) {
  const std::array<std::int64_t, kMaxBatchDims> sizes{1, 1, 1, 1 << 20};
  const ConstStridedView view{.batch_strides = {0, 0, 0, 1 << 20}, .head_stride = 1 << 30};
  EXPECT_EQ(slice_offset(view, sizes, (1 << 20) - 1, 8),
            ((std::int64_t{1} << 20) - 1) * (1 << 20) + (std::int64_t{8} << 30));
}

TEST(AttentionShape, CountsBatchesAndGroups) {
  const AttentionShape shape{.batch_sizes = {2, 1, 3, 4}, .query_heads = 12, .kv_heads = 3};
  EXPECT_EQ(shape.batch(), 24);
  EXPECT_EQ(shape.group(), 4);
  const AttentionShape headless{.query_heads = 0, .kv_heads = 0};
  EXPECT_EQ(headless.group(), 1);
}

}  // namespace
}  // namespace torch_ext
