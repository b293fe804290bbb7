// Every kernel table that this machine can run, for parameterised tests.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace torch_ext::testing {

struct KernelUnderTest {
  std::string name;  // also the prefix of the test's name
  const KernelTable* table;
  double norm_error = 0.0;  // relative, of norms in fp32 beyond their own rounding
};

inline void PrintTo(const KernelUnderTest& kernel, std::ostream* out) { *out << kernel.name; }

/// In the order of CpuCapability, then the emulated wide instruction sets.
std::vector<KernelUnderTest> kernels_under_test();

/// Those, and the CUDA programs of the mini-batch operators: on the host, and on a GPU where the
/// tests were built for one and there is one.
std::vector<KernelUnderTest> list_kernels_under_test();

inline std::string kernel_test_name(const ::testing::TestParamInfo<KernelUnderTest>& info) {
  return info.param.name;
}

class KernelTest : public ::testing::TestWithParam<KernelUnderTest> {
 protected:
  const KernelTable& kernel() const { return *GetParam().table; }
};

using AttentionKernelTest = KernelTest;

}  // namespace torch_ext::testing

/// Runs the TEST_P of `suite`, a KernelTest, on every kernel: "EachIsa/suite.test/avx2".
#define TORCH_EXT_TEST_EACH_ISA(suite)                                                      \
  INSTANTIATE_TEST_SUITE_P(EachIsa, suite,                                                  \
                           ::testing::ValuesIn(::torch_ext::testing::kernels_under_test()), \
                           ::torch_ext::testing::kernel_test_name)

/// The same for kernels of lists.
#define TORCH_EXT_TEST_EACH_LIST_KERNEL(suite)                                                   \
  INSTANTIATE_TEST_SUITE_P(EachIsa, suite,                                                       \
                           ::testing::ValuesIn(::torch_ext::testing::list_kernels_under_test()), \
                           ::torch_ext::testing::kernel_test_name)
