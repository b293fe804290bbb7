// The pieces of AVX2.
#include "kernels/cpu/isa_prelude.h"
#include "simd_pieces.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TORCH_EXT_VECTOR_BYTES 32
#define TORCH_EXT_ISA_NAME "avx2"
#define TORCH_EXT_HAS_AVX2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace torch_ext::testing::pieces_avx2 {
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
}  // namespace torch_ext::testing::pieces_avx2
#pragma GCC pop_options

namespace torch_ext::testing {
extern const SimdPieces kAvx2Pieces;
constinit const SimdPieces kAvx2Pieces = pieces_avx2::make_simd_pieces();
}  // namespace torch_ext::testing
#endif
