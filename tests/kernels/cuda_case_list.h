// The cases of the CPU kernels that the CUDA kernels are run on, on the host.
#pragma once

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

}  // namespace torch_ext::testing
