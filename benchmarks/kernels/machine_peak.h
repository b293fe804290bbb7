// What this machine can do at most, measured: multiply-adds from registers, bytes from memory. The
// yardsticks of the attention benchmarks.
#pragma once

#include <string>

namespace torch_ext_bench {

/// The widest multiply-add to measure; as TORCH_EXT_CPU_CAPABILITY's names, in increasing order.
enum class PeakCapability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

/// "default", "avx2", "avx512" or "avx512_bf16"; throws std::invalid_argument for anything else.
PeakCapability parse_peak_capability(const std::string& name);

/// The best that this processor has.
PeakCapability supported_peak_capability();

/// Multiply-adds in fp32, two FLOPs each, of `threads` threads together. 10^9 FLOP/s.
double measure_fma_gflops(PeakCapability capability, int threads);

/// vdpbf16ps with 512-bit vectors, or 0 where `capability` does not have it.
double measure_bf16_gflops(PeakCapability capability, int threads);

/// Reading memory that no cache holds, each thread its own part. 10^9 byte/s.
double measure_read_gbytes(int threads);

}  // namespace torch_ext_bench
