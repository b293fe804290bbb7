// The kernels for AVX2 with FMA and F16C (x86-64-v3).
#include "isa_prelude.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TORCH_EXT_VECTOR_BYTES 32
#define TORCH_EXT_ISA_NAME "avx2"
#define TORCH_EXT_HAS_AVX2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace torch_ext::isa_avx2 {
namespace {
#include "all_kernels-inl.h"
}  // namespace
}  // namespace torch_ext::isa_avx2
#pragma GCC pop_options

namespace torch_ext {
extern const KernelTable kAvx2Kernels;
constinit const KernelTable kAvx2Kernels = isa_avx2::make_kernel_table(CpuCapability::kAvx2);
}  // namespace torch_ext
#endif
