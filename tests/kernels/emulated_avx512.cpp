// The AVX-512 kernels, their intrinsics emulated on AVX2: lane counts, tails and tiles of the wide
// instruction sets are tested on machines that lack them.
#include "kernels/cpu/isa_prelude.h"
#include "simd_pieces.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#define TORCH_EXT_VECTOR_BYTES 64
#define TORCH_EXT_ISA_NAME "emulated_avx512"
#if defined(TORCH_EXT_HAS_SIMDE)
#define TORCH_EXT_HAS_AVX512
#endif

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "avx512_emulation.h"
namespace torch_ext::emulated_avx512 {
namespace {
// clang-format off
#include "kernels/cpu/all_kernels-inl.h"
#include "simd_pieces-inl.h"
// clang-format on
}  // namespace
}  // namespace torch_ext::emulated_avx512
#pragma GCC pop_options

namespace torch_ext::testing {
extern const KernelTable kEmulatedAvx512Kernels;
constinit const KernelTable kEmulatedAvx512Kernels =
    emulated_avx512::make_kernel_table(CpuCapability::kAvx512);
extern const SimdPieces kEmulatedAvx512Pieces;
constinit const SimdPieces kEmulatedAvx512Pieces = emulated_avx512::make_simd_pieces();
}  // namespace torch_ext::testing
#endif
