// The pieces as the baseline has them.
#include "kernels/cpu/isa_prelude.h"
#include "simd_pieces.h"

#define TORCH_EXT_VECTOR_BYTES 16
#define TORCH_EXT_ISA_NAME "default"

namespace torch_ext::testing::pieces_default {
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
}  // namespace torch_ext::testing::pieces_default

namespace torch_ext::testing {
extern const SimdPieces kGenericPieces;
constinit const SimdPieces kGenericPieces = pieces_default::make_simd_pieces();
}  // namespace torch_ext::testing
