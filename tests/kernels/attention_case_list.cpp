#include "attention_case_list.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "attention_check.h"

namespace torch_ext::testing {
namespace {

constexpr std::int64_t kLengths[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,   11,  12,
                                     13, 15, 16, 17, 23, 24, 25, 31, 32,  33,  47,
                                     48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129};

}  // namespace

Broadcast broadcast_of(int bits) {
  return {.batch = (bits & 1) != 0,
          .heads = (bits & 2) != 0,
          .rows = (bits & 4) != 0,
          .cols = (bits & 8) != 0};
}

CaseList numbered(CaseList cases) {
  std::int64_t seed = 1;
  for (AttentionCase& spec : cases) spec.seed = seed++;
  return cases;
}

CaseList tile_edge_cases(ScalarType dtype) {
  CaseList cases;
  const AttentionCase base{
      .dtype = dtype, .query_heads = 1, .kv_heads = 1, .head_dim = 8, .value_dim = 5};
  for (const std::int64_t length : kLengths) {
    for (const std::int64_t other : {1, 3, 64, 65, 130}) {
      AttentionCase spec = base;
      spec.q_len = length;
      spec.kv_len = other;
      cases.push_back(spec);
      spec.q_len = other;
      spec.kv_len = length;
      cases.push_back(spec);
    }
  }
  // Up to kMaxSubTiles sub-tiles of 12 to 32 rows share a block of keys.
  for (const std::int64_t q_len : {191, 193, 255, 257, 385, 513, 800}) {
    for (const std::int64_t kv_len : {63, 129, 193}) {
      AttentionCase spec = base;
      spec.q_len = q_len;
      spec.kv_len = kv_len;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList head_dim_cases(ScalarType dtype) {
  CaseList cases;
  const AttentionCase base{.dtype = dtype, .q_len = 19, .kv_len = 70};
  for (const std::int64_t head_dim :
       {1,  2,  3,  4,  5,  7,   8,   9,   15,  16,  17,  24,  31,  32,  33,  40,  48,  63,
        64, 65, 72, 80, 96, 100, 112, 127, 128, 129, 160, 192, 255, 256, 257, 384, 511, 512}) {
    AttentionCase spec = base;
    spec.head_dim = head_dim;
    cases.push_back(spec);
  }
  for (const auto& [head_dim, value_dim] : {std::pair{64, 1},
                                            {1, 64},
                                            {33, 80},
                                            {80, 33},
                                            {128, 256},
                                            {256, 17},
                                            {512, 3},
                                            {3, 512},
                                            {7, 8},
                                            {8, 7},
                                            {192, 128}}) {
    AttentionCase spec = base;
    spec.head_dim = head_dim;
    spec.value_dim = value_dim;
    spec.q_len = 37;
    cases.push_back(spec);
  }
  return numbered(cases);
}

CaseList zero_sized_cases(ScalarType dtype) {
  CaseList cases;
  for (int bits = 1; bits < 64; ++bits) {
    AttentionCase spec{.dtype = dtype,
                       .query_heads = 4,
                       .kv_heads = 2,
                       .q_len = 5,
                       .kv_len = 9,
                       .head_dim = 6,
                       .value_dim = 7};
    if (bits & 1) spec.batch_sizes[2] = 0;
    if (bits & 2) spec.query_heads = spec.kv_heads = 0;
    if (bits & 4) spec.q_len = 0;
    if (bits & 8) spec.kv_len = 0;
    if (bits & 16) spec.head_dim = 0;
    if (bits & 32) spec.value_dim = 0;
    cases.push_back(spec);
    spec.mask.kind = AttentionMaskKind::kBoolean;
    spec.key_padding = 0.3;
    spec.is_causal = true;
    spec.dropout = 0.5;
    spec.has_grad_logsumexp = true;
    cases.push_back(spec);
    spec.mask.kind = AttentionMaskKind::kAdditive;
    spec.mask.broadcast = broadcast_of(bits % 16);
    spec.wants_grad_mask = true;
    cases.push_back(spec);
  }
  return numbered(cases);
}

CaseList layout_cases(ScalarType dtype) {
  CaseList cases;
  int turn = 0;
  for (const Layout layout : kAllLayouts) {
    for (const std::int64_t head_dim : {16, 17, 40}) {
      AttentionCase spec{.dtype = dtype,
                         .batch_sizes = {2, 1, 1, 3},
                         .query_heads = 4,
                         .q_len = 13,
                         .kv_len = 67,
                         .head_dim = head_dim,
                         .value_dim = head_dim == 40 ? 24 : head_dim,
                         .layout = layout};
      // A packed tensor has its own layout.
      spec.packed = layout == Layout::kBhsd;
      for (const GuardSide guard : {GuardSide::kBack, GuardSide::kFront}) {
        spec.guard = guard;
        spec.grad_out_layout = kAllLayouts[turn++ % std::size(kAllLayouts)];
        cases.push_back(spec);
      }
    }
  }
  for (const Layout grad_out_layout : kAllLayouts) {
    cases.push_back({.dtype = dtype,
                     .batch_sizes = {1, 2, 1, 1},
                     .q_len = 35,
                     .kv_len = 21,
                     .head_dim = 33,
                     .layout = Layout::kBshd,
                     .grad_out_layout = grad_out_layout});
  }
  return numbered(cases);
}

CaseList batch_and_group_cases(ScalarType dtype) {
  CaseList cases;
  for (const auto& [query_heads, kv_heads] :
       {std::pair{4, 2}, {8, 1}, {6, 2}, {3, 1}, {5, 5}, {12, 4}, {16, 1}, {40, 1}, {32, 8}}) {
    for (const std::int64_t q_len : {1, 2, 3, 7, 33}) {
      AttentionCase spec{.dtype = dtype,
                         .batch_sizes = {1, 1, 1, 2},
                         .query_heads = query_heads,
                         .kv_heads = kv_heads,
                         .q_len = q_len,
                         .kv_len = 41,
                         .head_dim = 16,
                         .layout = Layout::kBshd};
      if (q_len % 2 == 1) {
        spec.is_causal = true;
        spec.causal_offset = spec.kv_len - q_len;
      }
      cases.push_back(spec);
    }
  }
  for (const auto& batch_sizes :
       {std::array<std::int64_t, 4>{2, 3, 1, 2}, {1, 5, 1, 1}, {3, 1, 1, 1}, {2, 2, 2, 2}}) {
    for (const Layout layout : {Layout::kHbsd, Layout::kExpandedBatch, Layout::kExpandedHeads}) {
      cases.push_back({.dtype = dtype,
                       .batch_sizes = batch_sizes,
                       .query_heads = 4,
                       .kv_heads = 2,
                       .q_len = 5,
                       .kv_len = 11,
                       .head_dim = 9,
                       .layout = layout,
                       .mask = {.kind = AttentionMaskKind::kBoolean}});
    }
  }
  return numbered(cases);
}

CaseList unrounded_gradient_cases(ScalarType dtype) {
  CaseList cases;
  for (const std::int64_t head_dim : {24, 64, 100, 130, 264}) {
    for (const Layout layout : {Layout::kBhsd, Layout::kPaddedRows}) {
      AttentionCase spec{.dtype = dtype,
                         .query_heads = 4,
                         .kv_heads = 2,
                         .q_len = 33,
                         .kv_len = 70,
                         .head_dim = head_dim,
                         .layout = layout,
                         .unrounded_grads = true};
      cases.push_back(spec);
      spec.mask.kind = AttentionMaskKind::kBoolean;
      spec.dropout = 0.2;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList causal_cases(ScalarType dtype) {
  CaseList cases;
  constexpr std::int64_t kHuge = std::int64_t{1} << 40;
  for (const auto& [q_len, kv_len] : {std::pair{1, 1},
                                      {7, 7},
                                      {33, 33},
                                      {64, 64},
                                      {65, 65},
                                      {130, 130},
                                      {9, 70},
                                      {70, 9},
                                      {129, 257},
                                      {257, 129}}) {
    for (const std::int64_t offset :
         {std::int64_t{0}, std::int64_t{kv_len - q_len}, std::int64_t{1}, std::int64_t{-1},
          std::int64_t{-5}, std::int64_t{31}, std::int64_t{64}, std::int64_t{-64},
          std::int64_t{-q_len}, std::int64_t{kv_len}, kHuge, -kHuge}) {
      AttentionCase spec{.dtype = dtype,
                         .query_heads = q_len % 2 == 0 ? 4 : 1,
                         .kv_heads = 1,
                         .q_len = q_len,
                         .kv_len = kv_len,
                         .head_dim = 12,
                         .is_causal = true,
                         .causal_offset = offset};
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList split_cases(ScalarType dtype) {
  CaseList cases;
  const AttentionCase base{
      .dtype = dtype, .query_heads = 1, .kv_heads = 1, .q_len = 7, .head_dim = 16};
  for (const std::int64_t kv_len : {1023, 1024, 1025, 2111, 5000}) {
    AttentionCase spec = base;
    spec.kv_len = kv_len;
    cases.push_back(spec);
    spec.q_len = 130;
    spec.is_causal = true;
    spec.causal_offset = kv_len - 130;
    if (kv_len < 2000) cases.push_back(spec);
    spec.q_len = 33;
    spec.causal_offset = 600;  // whole splits stay empty
    cases.push_back(spec);
    spec = base;
    spec.kv_len = kv_len;
    spec.query_heads = 3;
    spec.mask = {.kind = AttentionMaskKind::kBoolean, .pattern = MaskPattern::kWindow};
    spec.mask.window = 700;
    spec.dropout = 0.3;
    cases.push_back(spec);
    spec.mask = {.kind = AttentionMaskKind::kAdditive, .pattern = MaskPattern::kHalfRows};
    spec.wants_grad_mask = true;
    spec.key_padding = 0.4;
    spec.has_grad_logsumexp = true;
    cases.push_back(spec);
    spec.mask.broadcast = {.heads = true, .rows = true, .cols = kv_len % 2 == 0};
    cases.push_back(spec);
  }
  return numbered(cases);
}

CaseList thinned(CaseList cases) {
#if defined(TORCH_EXT_SLOW_BUILD)
  CaseList kept;
  for (std::size_t i = 0; i < cases.size(); i += 7) kept.push_back(cases[i]);
  return kept;
#else
  return cases;
#endif
}

void check_cases(const KernelTable& kernel, const CaseList& cases, bool forward_only) {
  int failed_cases = 0;
  for (AttentionCase spec : cases) {
    spec.forward_only |= forward_only;
    if (!check_attention(kernel, spec) && ++failed_cases == 3) {
      FAIL() << "the rest of " << cases.size() << " cases was not run";
    }
  }
}

}  // namespace torch_ext::testing
