// The CUDA attention kernels as KernelTables, so that the tests of the CPU kernels serve them too:
// run on the host (fiber_block.h) everywhere, and on a GPU where the tests are built for one and
// there is one.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace torch_ext::testing {

struct CudaAttentionKernels {
  std::string name;  // "emulated_cuda" or "cuda"
  const KernelTable* standard;
  const KernelTable* deterministic;  // dQ in a pass of its own, not by atomic additions
  // fp32 rounded to TF32:
  const KernelTable* tf32;
  const KernelTable* deterministic_tf32;
};

inline void PrintTo(const CudaAttentionKernels& kernels, std::ostream* out) {
  *out << kernels.name;
}

std::vector<CudaAttentionKernels> cuda_attention_kernels();

class CudaAttentionTest : public ::testing::TestWithParam<CudaAttentionKernels> {};

}  // namespace torch_ext::testing

/// Runs the TEST_P of `suite`, a CudaAttentionTest, on every kernel: "Cuda/suite.test/cuda".
#define TORCH_EXT_TEST_EACH_CUDA_ATTENTION(suite)                                               \
  INSTANTIATE_TEST_SUITE_P(Cuda, suite,                                                         \
                           ::testing::ValuesIn(::torch_ext::testing::cuda_attention_kernels()), \
                           [](const auto& info) { return info.param.name; })
