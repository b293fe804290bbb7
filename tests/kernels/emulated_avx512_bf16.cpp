// The AVX-512 kernels with bf16 pairs, their intrinsics emulated on AVX2, as emulated_avx512.cpp.
#include "kernels/cpu/isa_prelude.h"
#include "simd_pieces.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#define TORCH_EXT_VECTOR_BYTES 64
#define TORCH_EXT_ISA_NAME "emulated_avx512_bf16"
#if defined(TORCH_EXT_HAS_SIMDE)
#define TORCH_EXT_HAS_AVX512
#endif
#define TORCH_EXT_HAS_BF16_DOT

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "avx512_emulation.h"
namespace torch_ext::emulated_avx512_bf16 {
namespace {
// clang-format off
#include "kernels/cpu/all_kernels-inl.h"
#include "simd_pieces-inl.h"
// clang-format on
}  // namespace
}  // namespace torch_ext::emulated_avx512_bf16
#pragma GCC pop_options

namespace torch_ext::testing {
extern const KernelTable kEmulatedAvx512Bf16Kernels;
constinit const KernelTable kEmulatedAvx512Bf16Kernels =
    emulated_avx512_bf16::make_kernel_table(CpuCapability::kAvx512Bf16);
extern const SimdPieces kEmulatedAvx512Bf16Pieces;
constinit const SimdPieces kEmulatedAvx512Bf16Pieces = emulated_avx512_bf16::make_simd_pieces();
}  // namespace torch_ext::testing
#endif
