// The kernels for whatever the compiler assumes without being told: SSE2 on x86-64, NEON on
// AArch64.
#include "isa_prelude.h"

#define TORCH_EXT_VECTOR_BYTES 16
#define TORCH_EXT_ISA_NAME "default"

namespace torch_ext::isa_generic {
namespace {
#include "all_kernels-inl.h"
}  // namespace
}  // namespace torch_ext::isa_generic

namespace torch_ext {
extern const KernelTable kGenericKernels;
constinit const KernelTable kGenericKernels =
    isa_generic::make_kernel_table(CpuCapability::kDefault);
}  // namespace torch_ext
