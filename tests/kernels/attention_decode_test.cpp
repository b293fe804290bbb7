// Few rows against long keys: the decode kernel, and the border to the tile kernel.
#include <gtest/gtest.h>

#include <string>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels/cpu/attention_schedule.h"
#include "kernels_under_test.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

/// Rows that decode may have: (q_len, query heads per kv head).
constexpr std::pair<std::int64_t, std::int64_t> kFewRows[] = {{1, 1}, {2, 1}, {3, 1}, {4, 1},
                                                              {1, 2}, {1, 3}, {1, 4}, {2, 2}};

class AttentionDecode : public AttentionKernelTest {
 protected:
  std::string path_of(const AttentionCase& spec) const {
    const AttentionProblem problem(spec);
    return run_forward(kernel(), problem, SerialTaskRunner());
  }

  void check(const CaseList& cases) const {
    check_cases(kernel(), thinned(cases), /*forward_only=*/true);
  }
};

TEST_P(AttentionDecode, TakesFewRowsOfContiguousColumns) {
  const std::string prefix = "cpu." + GetParam().name;
  for (const auto& [q_len, group] : kFewRows) {
    for (const ScalarType dtype :
         {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
      AttentionCase spec{.dtype = dtype, .query_heads = 2 * group, .q_len = q_len};
      EXPECT_EQ(path_of(spec), prefix + ".decode") << describe(spec);
      spec.layout = Layout::kBshd;
      EXPECT_EQ(path_of(spec), prefix + ".decode") << describe(spec);
      spec.layout = Layout::kTransposed;
      EXPECT_EQ(path_of(spec), prefix + ".tile") << describe(spec);
    }
    EXPECT_EQ(path_of({.dtype = ScalarType::kFloat64, .query_heads = 2 * group, .q_len = q_len}),
              prefix + ".tile");
  }
  EXPECT_EQ(path_of({.q_len = kDecodeRows + 1}), prefix + ".tile");
  EXPECT_EQ(path_of({.query_heads = 6, .q_len = 2}), prefix + ".tile");
}

TEST_P(AttentionDecode, KeyLengths) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    for (const std::int64_t kv_len :
         {1,  2,  3,   4,   5,   7,   8,   9,   15,  16,   17,   31,   33,   63,
          64, 65, 127, 128, 129, 192, 511, 512, 513, 1023, 1024, 1025, 1599, 2050}) {
      for (const auto& [q_len, group] : kFewRows) {
        cases.push_back({.dtype = dtype,
                         .query_heads = group,
                         .kv_heads = 1,
                         .q_len = q_len,
                         .kv_len = kv_len,
                         .head_dim = 20,
                         .value_dim = 36});
      }
    }
    check(cases);
  }
}

TEST_P(AttentionDecode, HeadDims) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    for (const std::int64_t dim :
         {1,  2,  3,  4,  5,  7,  8,   9,   15,  16,  17,  23,  31,  32, 33,
          40, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256, 257, 512}) {
      for (const auto& [q_len, group] : {std::pair{1, 1}, {1, 2}, {3, 1}, {1, 4}}) {
        AttentionCase spec{.dtype = dtype,
                           .query_heads = 2 * group,
                           .q_len = q_len,
                           .kv_len = 75,
                           .head_dim = dim};
        cases.push_back(spec);
        spec.value_dim = 300 % (dim + 1) + 1;
        spec.guard = GuardSide::kFront;
        cases.push_back(spec);
      }
    }
    check(cases);
  }
}

TEST_P(AttentionDecode, Layouts) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    for (const Layout layout : kAllLayouts) {
      for (const bool packed : {false, true}) {
        for (const auto& [q_len, group] : {std::pair{1, 1}, {1, 4}, {3, 1}}) {
          cases.push_back({.dtype = dtype,
                           .batch_sizes = {2, 1, 3, 1},
                           .query_heads = 2 * group,
                           .q_len = q_len,
                           .kv_len = 70,
                           .head_dim = 19,
                           .layout = layout,
                           .packed = packed});
        }
      }
    }
    check(cases);
  }
}

TEST_P(AttentionDecode, MasksPaddingAndDropout) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    std::int64_t seed = 1;
    for (const auto& [q_len, group] : kFewRows) {
      for (const std::int64_t kv_len : {33, 200, 1300}) {
        if (kv_len == 1300 && q_len * group == 2) continue;
        const AttentionCase base{.dtype = dtype,
                                 .batch_sizes = {1, kv_len == 1300 ? 1 : 2, 1, 1},
                                 .query_heads = 2 * group,
                                 .q_len = q_len,
                                 .kv_len = kv_len,
                                 .head_dim = 16,
                                 .seed = seed++};
        AttentionCase spec = base;
        spec.is_causal = true;
        for (const std::int64_t offset : {kv_len - q_len, kv_len / 2, std::int64_t{-1}}) {
          spec.causal_offset = offset;
          cases.push_back(spec);
        }
        spec = base;
        spec.mask = {.kind = AttentionMaskKind::kBoolean, .pattern = MaskPattern::kBlocks};
        cases.push_back(spec);
        spec.mask = {.kind = AttentionMaskKind::kBoolean, .density = 0.02};
        spec.key_padding = 0.4;
        cases.push_back(spec);
        spec.mask = {.kind = AttentionMaskKind::kAdditive, .dtype = dtype};
        spec.mask.broadcast = {.heads = true, .rows = seed % 2 == 0};
        cases.push_back(spec);
        spec.mask.pattern = MaskPattern::kHalfRows;
        spec.dropout = 0.3;
        spec.is_causal = true;
        spec.causal_offset = kv_len - q_len - 3;
        cases.push_back(spec);
        spec = base;
        spec.dropout = 0.5;
        spec.scale = -0.4;
        cases.push_back(spec);
      }
    }
    check(cases);
  }
}

TEST_P(AttentionDecode, ManyHeadsShareOneLongCache) {
  for (const ScalarType dtype : kAllDtypes) {
    CaseList cases;
    // 16 query heads: the tile kernel; 4: decode; 40 batches: no splits.
    for (const auto& [batch, query_heads] : {std::pair{1, 16}, {1, 4}, {40, 4}}) {
      cases.push_back({.dtype = dtype,
                       .batch_sizes = {1, 1, 1, batch},
                       .query_heads = query_heads,
                       .kv_heads = query_heads / 4,
                       .q_len = 1,
                       .kv_len = 1100,
                       .head_dim = 24,
                       .layout = Layout::kBshd});
    }
    check(cases);
  }
}

TORCH_EXT_TEST_EACH_ISA(AttentionDecode);

}  // namespace
}  // namespace torch_ext::testing
