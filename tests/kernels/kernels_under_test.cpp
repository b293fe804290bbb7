#include "kernels_under_test.h"

#include "kernels/cpu/cpu_isa.h"

namespace torch_ext::testing {

std::vector<KernelUnderTest> kernels_under_test() {
  std::vector<KernelUnderTest> kernels;
  for (const CpuCapability capability : {CpuCapability::kDefault, CpuCapability::kAvx2,
                                         CpuCapability::kAvx512, CpuCapability::kAvx512Bf16}) {
    if (capability > supported_capability()) break;
    kernels.push_back({std::string(capability_name(capability)), &kernel_table(capability)});
  }
  return kernels;
}

}  // namespace torch_ext::testing
