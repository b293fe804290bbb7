// Each CUDA attention kernel in a few small calls: what runs under compute-sanitizer, where a
// second is a minute.
#include <gtest/gtest.h>

#include <initializer_list>

#include "attention_case_list.h"
#include "attention_check.h"
#include "cuda_attention_kernels.h"

namespace torch_ext::testing {
namespace {

class CudaEveryKernel : public CudaAttentionTest {};

/// Ragged tiles, two heads that share keys.
AttentionCase small(ScalarType dtype, std::int64_t q_len, std::int64_t head_dim) {
  return {.dtype = dtype,
          .query_heads = 2,
          .kv_heads = 1,
          .q_len = q_len,
          .kv_len = 150,
          .head_dim = head_dim};
}

CaseList plain_cases(ScalarType dtype, std::initializer_list<std::int64_t> head_dims) {
  CaseList cases;
  for (const std::int64_t head_dim : head_dims) {
    cases.push_back(small(dtype, 140, head_dim));
    cases.back().is_causal = true;
    cases.back().causal_offset = 10;
    cases.push_back(small(dtype, 3, head_dim));  // decoding
  }
  return thinned(numbered(cases));
}

CaseList masked_cases(ScalarType dtype, std::initializer_list<std::int64_t> head_dims) {
  CaseList cases;
  for (const std::int64_t head_dim : head_dims) {
    AttentionCase spec = small(dtype, 140, head_dim);
    spec.mask = {.kind = AttentionMaskKind::kAdditive, .broadcast = {.heads = true}};
    spec.wants_grad_mask = true;
    spec.dropout = 0.2;
    cases.push_back(spec);
    spec = small(dtype, 140, head_dim);
    spec.layout = Layout::kPaddedRows;
    spec.mask.kind = AttentionMaskKind::kBoolean;
    spec.key_padding = 0.3;
    cases.push_back(spec);
  }
  return thinned(numbered(cases));
}

TEST_P(CudaEveryKernel, Bf16) {
  check_cases(*GetParam().standard, plain_cases(ScalarType::kBFloat16, {64, 128, 256}), false);
  check_cases(*GetParam().standard, masked_cases(ScalarType::kBFloat16, {64, 128, 256}), false);
}

TEST_P(CudaEveryKernel, DeterministicFp16) {
  check_cases(*GetParam().deterministic, masked_cases(ScalarType::kFloat16, {64, 128, 256}), false);
}

TEST_P(CudaEveryKernel, ExactFp32AndFp64) {
  check_cases(*GetParam().standard, masked_cases(ScalarType::kFloat32, {40}), false);
  check_cases(*GetParam().standard, masked_cases(ScalarType::kFloat64, {40}), false);
}

TEST_P(CudaEveryKernel, Tf32) {
  CaseList cases = plain_cases(ScalarType::kFloat32, {64, 128});
  for (const AttentionCase& spec : masked_cases(ScalarType::kFloat32, {64, 128})) {
    cases.push_back(spec);
  }
  for (AttentionCase& spec : cases) spec.tolerance_factor *= 300.0;
  check_cases(*GetParam().tf32, cases, false);
  check_cases(*GetParam().deterministic_tf32, cases, false);
}

TEST_P(CudaEveryKernel, SplitKeys) {
  AttentionCase spec = small(ScalarType::kBFloat16, 3, 128);
  spec.kv_len = 1100;
  check_cases(*GetParam().standard, {spec}, true);
}

TORCH_EXT_TEST_EACH_CUDA_ATTENTION(CudaEveryKernel);

}  // namespace
}  // namespace torch_ext::testing
