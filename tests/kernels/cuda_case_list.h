// The cases of the CPU kernels that the CUDA kernels are run on, on the host.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "attention_case_list.h"

namespace torch_ext::testing {

/// Every `step`-th case, a fiber a thread being slow, without masks of types that the operators
/// refuse.
inline CaseList every(std::size_t step, const CaseList& cases) {
  CaseList kept;
  for (std::size_t i = 0; i < cases.size(); i += step) {
    const AttentionCase& spec = cases[i];
    if (spec.mask.kind == AttentionMaskKind::kAdditive && spec.mask.dtype != spec.dtype &&
        spec.mask.dtype != ScalarType::kFloat32) {
      continue;
    }
    kept.push_back(spec);
  }
  return thinned(kept);
}

/// Aligned rows and no mask, forward and backward: the kernels without options, and those of each
/// width with them.
inline CaseList aligned_cases(const std::vector<ScalarType>& dtypes,
                              const std::vector<std::int64_t>& head_dims) {
  CaseList cases;
  for (const ScalarType dtype : dtypes) {
    for (const std::int64_t head_dim : head_dims) {
      for (const auto& [q_len, kv_len] : {std::pair{64, 64}, {130, 200}, {193, 129}}) {
        AttentionCase spec{.dtype = dtype,
                           .query_heads = 2,
                           .kv_heads = 1,
                           .q_len = q_len,
                           .kv_len = kv_len,
                           .head_dim = head_dim};
        if (head_dim == 40) spec.value_dim = 72;
        cases.push_back(spec);
        spec.is_causal = true;
        spec.causal_offset = kv_len - q_len;
        spec.has_grad_logsumexp = true;
        cases.push_back(spec);
        spec.dropout = 0.3;
        if (q_len == 130) cases.push_back(spec);
      }
    }
  }
  return numbered(cases);
}

}  // namespace torch_ext::testing
