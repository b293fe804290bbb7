#include "machine_peak.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

namespace torch_ext_bench {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr int kRepetitions = 7;
constexpr std::int64_t kIterations = 4'000'000;  // a few milliseconds each repetition
// Two multiply-add ports with 4 cycles of latency want 8 independent sums; 12 leave some slack and,
// with the two factors, fit the 16 registers of AVX2.
constexpr int kChains = 12;

/// Starts body(thread) on all threads at once; returns the seconds until the last one is done.
template <typename Body>
double run_together(int threads, const Body& body) {
  std::atomic<int> waiting{threads};
  std::vector<double> started(threads), ended(threads);
  std::vector<std::thread> workers;
  for (int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      waiting.fetch_sub(1);
      while (waiting.load() > 0) {
      }
      started[thread] = now();
      body(thread);
      ended[thread] = now();
    });
  }
  for (std::thread& worker : workers) worker.join();
  return *std::max_element(ended.begin(), ended.end()) -
         *std::min_element(started.begin(), started.end());
}

template <typename Body>
double fastest(int threads, const Body& body) {
  run_together(threads, body);  // brings the clock up
  double seconds = run_together(threads, body);
  for (int i = 1; i < kRepetitions; ++i) seconds = std::min(seconds, run_together(threads, body));
  return seconds;
}

#if defined(__x86_64__)
// Assembly, so that no compiler removes or reorders anything: VECTOR registers, OP "c, b, sum".
#define TORCH_EXT_BENCH_CHAINS(TARGET, NAME, VECTOR, OP)                             \
  __attribute__((target(TARGET))) void NAME() {                                      \
    VECTOR b{}, c{};                                                                 \
    VECTOR s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{}; \
    for (std::int64_t i = 0; i < kIterations; ++i) {                                 \
      asm volatile(OP " %2, %1, %0" : "+x"(s0) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s1) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s2) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s3) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s4) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s5) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s6) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s7) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s8) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s9) : "x"(b), "x"(c));                    \
      asm volatile(OP " %2, %1, %0" : "+x"(s10) : "x"(b), "x"(c));                   \
      asm volatile(OP " %2, %1, %0" : "+x"(s11) : "x"(b), "x"(c));                   \
    }                                                                                \
  }
TORCH_EXT_BENCH_CHAINS("avx2,fma", fma_256, __m256, "vfmadd231ps")
TORCH_EXT_BENCH_CHAINS("avx512f", fma_512, __m512, "vfmadd231ps")
TORCH_EXT_BENCH_CHAINS("avx512f", bf16_512, __m512, "vdpbf16ps")
#undef TORCH_EXT_BENCH_CHAINS
#endif

/// The baseline instruction set through compiler vectors: a multiplication and an addition where it
/// has no fused one.
void multiply_add_128() {
  using Vector __attribute__((vector_size(16))) = float;
  Vector sum[kChains]{};
  Vector b{1e-3f, 1e-3f, 1e-3f, 1e-3f};
  for (std::int64_t i = 0; i < kIterations; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * b + b;
#if defined(__x86_64__)
    asm volatile("" : "+x"(b));
#else
    asm volatile("" : "+w"(b));
#endif
  }
  for (Vector& value : sum) {
    asm volatile("" ::"m"(value));
  }
}

double gflops(int threads, int flops_per_instruction, void (*body)()) {
  const double seconds = fastest(threads, [body](int) { body(); });
  return 1e-9 * threads * kIterations * kChains * flops_per_instruction / seconds;
}

}  // namespace

PeakCapability parse_peak_capability(const std::string& name) {
  if (name == "default") return PeakCapability::kDefault;
  if (name == "avx2") return PeakCapability::kAvx2;
  if (name == "avx512") return PeakCapability::kAvx512;
  if (name == "avx512_bf16") return PeakCapability::kAvx512Bf16;
  throw std::invalid_argument("capability takes default, avx2, avx512 or avx512_bf16, got " + name);
}

PeakCapability supported_peak_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    return __builtin_cpu_supports("avx512bf16") ? PeakCapability::kAvx512Bf16
                                                : PeakCapability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PeakCapability::kAvx2;
#endif
  return PeakCapability::kDefault;
}

double measure_fma_gflops(PeakCapability capability, int threads) {
#if defined(__x86_64__)
  if (capability >= PeakCapability::kAvx512) return gflops(threads, 32, fma_512);
  if (capability == PeakCapability::kAvx2) return gflops(threads, 16, fma_256);
#endif
  return gflops(threads, 8, multiply_add_128);
}

double measure_bf16_gflops([[maybe_unused]] PeakCapability capability,
                           [[maybe_unused]] int threads) {
#if defined(__x86_64__)
  if (capability == PeakCapability::kAvx512Bf16) return gflops(threads, 64, bf16_512);
#endif
  return 0.0;
}

double measure_read_gbytes(int threads) {
  using Vector __attribute__((vector_size(32))) = std::uint64_t;
  constexpr std::size_t kStep = 8 * sizeof(Vector);  // two cache lines a stream of eight loads
  const long last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
  // Four times the last level, whose size the system may not tell.
  const std::size_t total =
      std::max<std::size_t>(std::size_t{256} << 20, 4 * std::max<long>(last_level, 0));
  const std::size_t part = total / threads / kStep * kStep;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<char, Free>> parts(threads);
  run_together(threads, [&](int thread) {  // each thread touches its own first
    char* memory = static_cast<char*>(std::aligned_alloc(kStep, part));
    if (memory == nullptr) std::abort();
    std::fill_n(memory, part, static_cast<char>(1));
    parts[thread].reset(memory);
  });
  const double seconds = fastest(threads, [&](int thread) {
    const auto* data = reinterpret_cast<const Vector*>(parts[thread].get());
    Vector sum[8]{};
    for (std::size_t i = 0; i < part / sizeof(Vector); i += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[j] ^= data[i + j];
    }
    for (Vector& value : sum) {
      asm volatile("" ::"m"(value));
    }
  });
  return 1e-9 * static_cast<double>(part) * threads / seconds;
}

}  // namespace torch_ext_bench
