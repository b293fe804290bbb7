#include "simd_pieces.h"

#include "kernels/cpu/cpu_isa.h"

namespace torch_ext::testing {

extern const SimdPieces kGenericPieces;
#if defined(__x86_64__)
extern const SimdPieces kAvx2Pieces;
extern const SimdPieces kAvx512Pieces;
extern const SimdPieces kAvx512Bf16Pieces;
extern const SimdPieces kEmulatedAvx512Pieces;
extern const SimdPieces kEmulatedAvx512Bf16Pieces;
#endif

std::vector<NamedSimdPieces> simd_pieces_under_test() {
  std::vector<NamedSimdPieces> result{{"default", &kGenericPieces}};
#if defined(__x86_64__)
  const CpuCapability supported = supported_capability();
  if (supported >= CpuCapability::kAvx2) result.push_back({"avx2", &kAvx2Pieces});
  if (supported >= CpuCapability::kAvx512) result.push_back({"avx512", &kAvx512Pieces});
  if (supported >= CpuCapability::kAvx512Bf16) {
    result.push_back({"avx512_bf16", &kAvx512Bf16Pieces});
  }
  if (supported >= CpuCapability::kAvx2) {
    result.push_back({"emulated_avx512", &kEmulatedAvx512Pieces});
    result.push_back({"emulated_avx512_bf16", &kEmulatedAvx512Bf16Pieces});
  }
#endif
  return result;
}

}  // namespace torch_ext::testing
