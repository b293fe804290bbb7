#include "kernel_table.h"

namespace torch_ext {

extern const KernelTable kGenericKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
#endif

const KernelTable& kernel_table() { return kernel_table(current_capability()); }

const KernelTable& kernel_table(CpuCapability capability) {
#if defined(__x86_64__)
  switch (capability) {
    case CpuCapability::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case CpuCapability::kAvx512:
      return kAvx512Kernels;
    case CpuCapability::kAvx2:
      return kAvx2Kernels;
    case CpuCapability::kDefault:
      break;
  }
#else
  static_cast<void>(capability);
#endif
  return kGenericKernels;
}

}  // namespace torch_ext
