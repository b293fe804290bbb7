// The kernels for AVX-512 with BF16: bf16 operands are multiplied in pairs by vdpbf16ps.
#include "isa_prelude.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC bug 105593: false alarms inside the AVX-512 intrinsics, reported at every use.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define TORCH_EXT_VECTOR_BYTES 64
#define TORCH_EXT_ISA_NAME "avx512_bf16"
#define TORCH_EXT_HAS_AVX512
#define TORCH_EXT_HAS_BF16_DOT

#pragma GCC push_options
#pragma GCC target( \
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
namespace torch_ext::isa_avx512_bf16 {
namespace {
#include "all_kernels-inl.h"
}  // namespace
}  // namespace torch_ext::isa_avx512_bf16
#pragma GCC pop_options

namespace torch_ext {
extern const KernelTable kAvx512Bf16Kernels;
constinit const KernelTable kAvx512Bf16Kernels =
    isa_avx512_bf16::make_kernel_table(CpuCapability::kAvx512Bf16);
}  // namespace torch_ext
#endif
