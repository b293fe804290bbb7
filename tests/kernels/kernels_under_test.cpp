#include "kernels_under_test.h"

#include "kernels/cpu/cpu_isa.h"

namespace torch_ext::testing {

#if defined(__x86_64__)
extern const KernelTable kEmulatedAvx512Kernels;
extern const KernelTable kEmulatedAvx512Bf16Kernels;
#endif

std::vector<KernelUnderTest> kernels_under_test() {
  std::vector<KernelUnderTest> kernels;
  for (const CpuCapability capability : {CpuCapability::kDefault, CpuCapability::kAvx2,
                                         CpuCapability::kAvx512, CpuCapability::kAvx512Bf16}) {
    if (capability > supported_capability()) break;
    kernels.push_back({std::string(capability_name(capability)), &kernel_table(capability)});
  }
#if defined(__x86_64__)
  if (supported_capability() >= CpuCapability::kAvx2) {  // what they are compiled for
    kernels.push_back({"emulated_avx512", &kEmulatedAvx512Kernels});
    kernels.push_back({"emulated_avx512_bf16", &kEmulatedAvx512Bf16Kernels});
  }
#endif
  return kernels;
}

}  // namespace torch_ext::testing
