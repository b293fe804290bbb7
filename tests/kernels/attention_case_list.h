// The problems that forward and backward kernels share, one list per feature.
#pragma once

#include <vector>

#include "attention_case.h"
#include "kernels/cpu/kernel_table.h"

namespace torch_ext::testing {

inline constexpr ScalarType kAllDtypes[] = {ScalarType::kFloat32, ScalarType::kFloat64,
                                            ScalarType::kBFloat16, ScalarType::kFloat16};

inline constexpr Layout kAllLayouts[] = {
    Layout::kBhsd,          Layout::kBshd,         Layout::kSbhd,           Layout::kHbsd,
    Layout::kPaddedRows,    Layout::kTransposed,   Layout::kEverySecondCol, Layout::kExpandedBatch,
    Layout::kExpandedHeads, Layout::kExpandedRows, Layout::kExpandedAll};

using CaseList = std::vector<AttentionCase>;

/// Lengths around vectors (2 to 16 lanes), sub-tiles (6 to 32 rows), blocks (64 keys) and tasks.
CaseList tile_edge_cases(ScalarType dtype);
CaseList head_dim_cases(ScalarType dtype);
/// Each dimension 0, alone and together.
CaseList zero_sized_cases(ScalarType dtype);
/// Every layout of every tensor, packed too, with an inaccessible page behind or before.
CaseList layout_cases(ScalarType dtype);
CaseList batch_and_group_cases(ScalarType dtype);
/// Gradients that the caller is to sum up, and round after that.
CaseList unrounded_gradient_cases(ScalarType dtype);
CaseList causal_cases(ScalarType dtype);
CaseList boolean_mask_cases(ScalarType dtype);
CaseList additive_mask_cases(ScalarType dtype);
CaseList key_padding_cases(ScalarType dtype);
CaseList scale_cases(ScalarType dtype);
CaseList dropout_cases(ScalarType dtype);
/// Few rows and many keys: the keys are split among tasks.
CaseList split_cases(ScalarType dtype);

CaseList window_cases(ScalarType dtype);
CaseList sink_cases(ScalarType dtype);
CaseList softcap_cases(ScalarType dtype);
CaseList alibi_cases(ScalarType dtype);

/// `count` cases of any features together, the same for the same seed.
CaseList random_cases(std::uint64_t seed, int count);
/// The same with windows, soft caps, ALiBi and sinks.
CaseList random_modified_cases(std::uint64_t seed, int count);

/// Bits 0 to 3: batch, heads, rows, cols.
Broadcast broadcast_of(int bits);

/// Other random numbers for each case of a list.
CaseList numbered(CaseList cases);

/// All of `cases`, or every few of them where the build is slow (sanitizers).
CaseList thinned(CaseList cases);

/// check_attention() on each case, until three have failed.
void check_cases(const KernelTable& kernel, const CaseList& cases, bool forward_only);

}  // namespace torch_ext::testing
