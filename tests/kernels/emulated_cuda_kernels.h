// The CUDA kernels as a KernelTable whose kernels run on the host, so that the tests of the CPU
// kernels serve them too.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace torch_ext::testing {

/// dQ by atomic additions, or in a pass of its own: deterministic.
extern const KernelTable kEmulatedCudaKernels;
extern const KernelTable kEmulatedDeterministicCudaKernels;

}  // namespace torch_ext::testing
