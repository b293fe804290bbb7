// The CUDA kernels as a KernelTable whose kernels run on the host, so that the tests of the CPU
// kernels serve them too.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace torch_ext::testing {

/// dQ by atomic additions, or in a pass of its own: deterministic.
extern const KernelTable kFiberCudaKernels;
extern const KernelTable kFiberDeterministicCudaKernels;

}  // namespace torch_ext::testing
