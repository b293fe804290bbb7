// machine_peak [THREADS [CAPABILITY]]: prints the machine's ceilings as one line of JSON.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>

#include "machine_peak.h"

int main(int argc, char** argv) try {
  using namespace torch_ext_bench;
  const int threads =
      argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  if (threads < 1) {
    std::fprintf(stderr, "machine_peak: THREADS takes a number of at least 1, got %s\n", argv[1]);
    return 2;
  }
  const PeakCapability capability =
      argc > 2 ? parse_peak_capability(argv[2]) : supported_peak_capability();
  if (capability > supported_peak_capability()) {
    std::fprintf(stderr, "machine_peak: this processor does not have %s\n", argv[2]);
    return 2;
  }
  std::printf(
      "{\"threads\": %d, \"fma_gflops\": %.2f, \"bf16_gflops\": %.2f, \"read_gbytes\": %.2f}\n",
      threads, measure_fma_gflops(capability, threads), measure_bf16_gflops(capability, threads),
      measure_read_gbytes(threads));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "machine_peak: %s\n", error.what());
  return 2;
}
