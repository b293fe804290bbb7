// The pieces of AVX-512 with BF16.
#include "kernels/cpu/isa_prelude.h"
#include "simd_pieces.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TORCH_EXT_VECTOR_BYTES 64
#define TORCH_EXT_ISA_NAME "avx512_bf16"
#define TORCH_EXT_HAS_AVX512
#define TORCH_EXT_HAS_BF16_DOT

#pragma GCC push_options
#pragma GCC target( \
    "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
namespace torch_ext::testing::pieces_avx512_bf16 {
namespace {
// clang-format off
#include "kernels/cpu/simd_vector-inl.h"
#include "kernels/cpu/vector_tanh-inl.h"
#include "kernels/cpu/element_conversion-inl.h"
#include "kernels/cpu/bf16_pairs-inl.h"
#include "kernels/cpu/tile_contraction-inl.h"
#include "kernels/cpu/operand_staging-inl.h"
#include "kernels/cpu/attention_dropout-inl.h"
#include "simd_pieces-inl.h"
// clang-format on
}  // namespace
}  // namespace torch_ext::testing::pieces_avx512_bf16
#pragma GCC pop_options

namespace torch_ext::testing {
extern const SimdPieces kAvx512Bf16Pieces;
constinit const SimdPieces kAvx512Bf16Pieces = pieces_avx512_bf16::make_simd_pieces();
}  // namespace torch_ext::testing
#endif
