// Windows, soft caps, ALiBi and sinks, each along every path, and all of them at random.
#include <algorithm>
#include <random>

#include "attention_case_list.h"

namespace torch_ext::testing {
namespace {

/// Tiles, grouped heads, decoding, splits of the keys, chunks of the backward pass.
CaseList path_cases(ScalarType dtype) {
  const AttentionCase base{.dtype = dtype, .q_len = 70, .kv_len = 90, .head_dim = 20};
  CaseList cases{base};
  AttentionCase spec = base;
  spec.query_heads = 6;
  spec.q_len = 33;
  spec.batch_sizes = {1, 2, 1, 2};
  cases.push_back(spec);
  for (const std::int64_t q_len : {1, 2, 3}) {
    spec = base;
    spec.q_len = q_len;
    spec.kv_len = 200;
    spec.causal_offset = spec.kv_len - q_len;
    cases.push_back(spec);
  }
  spec = base;
  spec.query_heads = spec.kv_heads = 1;
  spec.q_len = 40;
  spec.kv_len = 1100;
  spec.causal_offset = spec.kv_len - spec.q_len;
  cases.push_back(spec);
  spec.q_len = 2;
  cases.push_back(spec);
  return cases;
}

/// Some of what goes with a modifier, in turn.
void vary(AttentionCase& spec, int number) {
  if (number % 3 == 1) spec.is_causal = true;
  if (number % 4 == 2) spec.dropout = 0.3;
  if (number % 5 == 3) spec.key_padding = 0.3;
  if (number % 5 == 4) {
    spec.mask.kind = AttentionMaskKind::kAdditive;
    spec.mask.dtype = spec.dtype;
    spec.wants_grad_mask = true;
  }
  if (number % 7 == 5) spec.mask.kind = AttentionMaskKind::kBoolean;
  spec.has_grad_logsumexp = number % 2 == 1;
}

}  // namespace

CaseList window_cases(ScalarType dtype) {
  CaseList cases;
  int number = 0;
  for (const AttentionCase& base : path_cases(dtype)) {
    for (const std::int64_t left : {std::int64_t{0}, std::int64_t{9}, std::int64_t{64},
                                    std::int64_t{500}, kUnbounded - 1, kUnbounded}) {
      for (const std::int64_t right : {std::int64_t{0}, std::int64_t{21}, kUnbounded}) {
        AttentionCase spec = base;
        spec.window_left = left;
        spec.window_right = right;
        vary(spec, number++);
        spec.is_causal = false;
        cases.push_back(spec);
      }
    }
  }
  // Offsets that leave some queries, or all of them, without a key.
  for (const std::int64_t offset :
       {std::int64_t{-300}, std::int64_t{-50}, std::int64_t{60}, std::int64_t{300},
        std::int64_t{INT64_MIN}, std::int64_t{INT64_MAX}}) {
    AttentionCase spec{.dtype = dtype, .q_len = 50, .kv_len = 130};
    spec.window_left = 30;
    spec.window_right = 10;
    spec.causal_offset = offset;
    cases.push_back(spec);
    spec.q_len = 2;
    cases.push_back(spec);
  }
  // Long beside its window: most tiles lie outside.
  for (const std::int64_t left : {5, 100}) {
    AttentionCase spec{.dtype = dtype,
                       .query_heads = 1,
                       .kv_heads = 1,
                       .q_len = 700,
                       .kv_len = 700,
                       .head_dim = 4};
    spec.window_left = left;
    spec.is_causal = true;
    cases.push_back(spec);
    spec.dropout = 0.5;
    spec.key_padding = 0.2;
    cases.push_back(spec);
  }
  return numbered(cases);
}

CaseList sink_cases(ScalarType dtype) {
  CaseList cases;
  int number = 0;
  for (AttentionCase spec : path_cases(dtype)) {
    spec.sink = true;
    for (int i = 0; i < 6; ++i) {
      AttentionCase varied = spec;
      vary(varied, number++);
      cases.push_back(varied);
    }
  }
  // Rows with the sink alone; scores beside which it is nothing, or everything.
  AttentionCase spec{.dtype = dtype, .q_len = 40, .kv_len = 70, .sink = true};
  for (const std::int64_t q_len : {3, 40}) {
    spec.q_len = q_len;
    spec.mask = {.kind = AttentionMaskKind::kBoolean, .pattern = MaskPattern::kHalfRows};
    spec.magnitude = 1.0;
    cases.push_back(spec);
    spec.mask = {};
    for (const double magnitude : {10.0, 100.0}) {
      spec.magnitude = magnitude;
      cases.push_back(spec);
    }
  }
  return numbered(cases);
}

CaseList softcap_cases(ScalarType dtype) {
  CaseList cases;
  int number = 0;
  for (AttentionCase spec : path_cases(dtype)) {
    for (const double softcap : {0.5, 5.0, 50.0}) {
      spec.softcap = softcap;
      spec.magnitude = number % 4 == 3 ? 6.0 : 1.0;
      AttentionCase varied = spec;
      vary(varied, number++);
      cases.push_back(varied);
    }
  }
  return numbered(cases);
}

CaseList alibi_cases(ScalarType dtype) {
  CaseList cases;
  int number = 0;
  for (AttentionCase spec : path_cases(dtype)) {
    spec.alibi = true;
    for (int i = 0; i < 4; ++i) {
      spec.alibi_varies = i % 2 == 1;
      AttentionCase varied = spec;
      vary(varied, number++);
      cases.push_back(varied);
    }
  }
  return numbered(cases);
}

CaseList random_modified_cases(std::uint64_t seed, int count) {
  CaseList cases = random_cases(seed, count);
  std::mt19937_64 engine(seed);
  const auto below = [&engine](std::int64_t end) {
    return static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(end));
  };
  for (AttentionCase& spec : cases) {
    spec.magnitude = std::min(spec.magnitude, 30.0);  // larger ones are random_cases' part
    if (below(2) == 0) spec.window_left = below(2) == 0 ? below(20) : below(spec.kv_len + 1);
    if (below(3) == 0) spec.window_right = below(spec.kv_len + 1);
    if (!spec.is_causal && below(2) == 0) {
      const std::int64_t offsets[] = {spec.kv_len - spec.q_len,
                                      below(spec.q_len + spec.kv_len + 1) - spec.q_len};
      spec.causal_offset = offsets[below(2)];
    }
    const double caps[] = {0.0, 0.0, 2.0, 30.0};
    spec.softcap = caps[below(4)];
    spec.alibi = below(3) == 0;
    spec.alibi_varies = below(2) == 0;
    spec.sink = below(2) == 0;
  }
  return cases;
}

}  // namespace torch_ext::testing
