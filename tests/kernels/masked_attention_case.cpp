#include <cmath>
#include <limits>

#include "attention_case_list.h"

namespace torch_ext::testing {
namespace {

constexpr MaskPattern kPatterns[] = {MaskPattern::kRandom, MaskPattern::kFull,
                                     MaskPattern::kEmpty,  MaskPattern::kWindow,
                                     MaskPattern::kBlocks, MaskPattern::kHalfRows};

}  // namespace

CaseList boolean_mask_cases(ScalarType dtype) {
  CaseList cases;
  const AttentionCase base{.dtype = dtype,
                           .batch_sizes = {2, 1, 1, 2},
                           .query_heads = 4,
                           .kv_heads = 2,
                           .q_len = 33,
                           .kv_len = 67,
                           .head_dim = 16,
                           .mask = {.kind = AttentionMaskKind::kBoolean}};
  for (int bits = 0; bits < 16; ++bits) {
    AttentionCase spec = base;
    spec.mask.broadcast = broadcast_of(bits);
    cases.push_back(spec);
    spec.is_causal = true;
    spec.causal_offset = 30;
    spec.mask.density = 0.4;
    cases.push_back(spec);
  }
  for (const Layout layout : kAllLayouts) {
    AttentionCase spec = base;
    spec.mask.layout = layout;
    spec.query_heads = spec.kv_heads = 3;
    cases.push_back(spec);
  }
  for (const MaskPattern pattern : kPatterns) {
    for (const auto& [q_len, kv_len] : {std::pair{70, 70}, {200, 200}, {3, 300}, {300, 3}}) {
      AttentionCase spec = base;
      spec.batch_sizes = {1, 1, 1, 1};
      spec.q_len = q_len;
      spec.kv_len = kv_len;
      spec.query_heads = q_len == 70 ? 2 : 1;
      spec.kv_heads = 1;
      spec.mask.pattern = pattern;
      spec.mask.window = 40;
      spec.mask.density = 0.5;
      cases.push_back(spec);
      spec.mask.broadcast.heads = true;
      spec.mask.window = 5;
      spec.key_padding = 0.5;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList additive_mask_cases(ScalarType dtype) {
  CaseList cases;
  const AttentionCase base{.dtype = dtype,
                           .batch_sizes = {2, 1, 1, 2},
                           .query_heads = 4,
                           .kv_heads = 2,
                           .q_len = 21,
                           .kv_len = 45,
                           .head_dim = 16,
                           .mask = {.kind = AttentionMaskKind::kAdditive, .dtype = dtype}};
  for (int bits = 0; bits < 16; ++bits) {
    AttentionCase spec = base;
    spec.mask.broadcast = broadcast_of(bits);
    spec.wants_grad_mask = true;
    cases.push_back(spec);
    spec.is_causal = true;
    spec.causal_offset = 17;
    spec.key_padding = 0.2;
    spec.dropout = 0.2;
    spec.has_grad_logsumexp = true;
    cases.push_back(spec);
    // Batch and heads that share a gradient, more of them than tasks.
    spec = base;
    spec.mask.broadcast = broadcast_of(bits);
    spec.wants_grad_mask = true;
    spec.batch_sizes = {3, 1, 7, 1};
    spec.q_len = 5;
    spec.kv_len = 9;
    cases.push_back(spec);
  }
  for (const Layout layout : kAllLayouts) {
    AttentionCase spec = base;
    spec.mask.layout = layout;
    spec.query_heads = spec.kv_heads = 3;
    cases.push_back(spec);
  }
  for (const ScalarType mask_dtype : kAllDtypes) {
    for (const MaskPattern pattern : kPatterns) {
      AttentionCase spec = base;
      spec.mask.dtype = mask_dtype;
      spec.mask.pattern = pattern;
      spec.q_len = 70;
      spec.kv_len = 70;
      spec.batch_sizes = {1, 1, 1, 1};
      spec.wants_grad_mask = pattern == MaskPattern::kWindow;
      cases.push_back(spec);
      spec.mask.excluded = -1e4;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList key_padding_cases(ScalarType dtype) {
  CaseList cases;
  for (const double share : {0.05, 0.5, 0.95, 1.0}) {
    for (const auto& [q_len, kv_len] : {std::pair{1, 33}, {9, 64}, {40, 129}, {130, 70}}) {
      for (const bool shared : {false, true}) {
        AttentionCase spec{.dtype = dtype,
                           .batch_sizes = {2, 1, 2, 1},
                           .query_heads = 2,
                           .kv_heads = 1,
                           .q_len = q_len,
                           .kv_len = kv_len,
                           .head_dim = 16,
                           .key_padding = share,
                           .key_padding_shared = shared};
        cases.push_back(spec);
        spec.is_causal = true;
        spec.causal_offset = kv_len - q_len;
        spec.mask.kind = shared ? AttentionMaskKind::kBoolean : AttentionMaskKind::kAdditive;
        cases.push_back(spec);
      }
    }
  }
  return numbered(cases);
}

CaseList scale_cases(ScalarType dtype) {
  CaseList cases;
  for (const double scale : {0.0, -0.3, 1.0, -2.0}) {
    for (const std::int64_t q_len : {1, 30}) {
      AttentionCase spec{
          .dtype = dtype, .q_len = q_len, .kv_len = 90, .head_dim = 20, .scale = scale};
      // Nearly one key takes it all: dP and delta, made of the rounded `out`, cancel.
      if (std::fabs(scale) >= 1.0) spec.tolerance_factor = 3.0;
      cases.push_back(spec);
      spec.is_causal = true;
      spec.causal_offset = 10;
      cases.push_back(spec);
      spec.mask.kind = AttentionMaskKind::kAdditive;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList dropout_cases(ScalarType dtype) {
  CaseList cases;
  // 1e-5 rounds to one part in 2^16, 0.999999 to 1.
  for (const double probability : {0.1, 0.5, 1.0, 1e-5, 0.999999}) {
    for (const auto& [q_len, kv_len] :
         {std::pair{1, 1}, {1, 77}, {3, 130}, {20, 7}, {33, 65}, {130, 129}}) {
      AttentionCase spec{.dtype = dtype,
                         .batch_sizes = {1, 2, 1, 1},
                         .query_heads = 4,
                         .kv_heads = 2,
                         .q_len = q_len,
                         .kv_len = kv_len,
                         .head_dim = 10,
                         .dropout = probability};
      cases.push_back(spec);
      spec.is_causal = true;
      spec.causal_offset = kv_len - q_len;
      spec.has_grad_logsumexp = true;
      cases.push_back(spec);
    }
  }
  cases = numbered(cases);
  cases.front().seed = std::numeric_limits<std::int64_t>::min();
  cases.back().seed = -1;
  return cases;
}

}  // namespace torch_ext::testing
