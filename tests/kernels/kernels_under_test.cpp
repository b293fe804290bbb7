#include "kernels_under_test.h"

#include "device_mirror.h"
#include "kernels/cpu/cpu_isa.h"

namespace torch_ext::testing {

#if defined(__x86_64__)
extern const KernelTable kEmulatedAvx512Kernels;
extern const KernelTable kEmulatedAvx512Bf16Kernels;
#endif

extern const KernelTable kEmulatedCudaKernels;
#if defined(TORCH_EXT_CUDA_TESTS)
extern const KernelTable kDeviceListKernels;
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

std::vector<KernelUnderTest> list_kernels_under_test() {
  std::vector<KernelUnderTest> kernels = kernels_under_test();
  // Squares of a few floats are added in float, on the way to sums in double.
  constexpr double kFewSquares = 0x1p-22;
  kernels.push_back({"emulated_cuda", &kEmulatedCudaKernels, kFewSquares});
#if defined(TORCH_EXT_CUDA_TESTS)
  if (has_cuda_device()) kernels.push_back({"cuda", &kDeviceListKernels, kFewSquares});
#endif
  return kernels;
}

}  // namespace torch_ext::testing
