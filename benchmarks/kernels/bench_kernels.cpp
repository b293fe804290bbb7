// The attention kernels as a fraction of what the machine can do, without torch in between.
//   bench_kernels [--threads=N] [Google Benchmark's options]
// TORCH_EXT_CPU_CAPABILITY chooses the instruction set; the peaks are measured for the same one.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernel_call.h"
#include "kernels/cpu/cpu_isa.h"
#include "machine_peak.h"

namespace torch_ext_bench {
namespace {

struct Ceilings {
  double fma_gflops;
  double bf16_gflops;  // 0: no bf16 dot products in this instruction set
  double read_gbytes;
};

struct NamedType {
  ScalarType dtype;
  const char* name;
};
constexpr NamedType kTypes[] = {{ScalarType::kFloat32, "fp32"},
                                {ScalarType::kBFloat16, "bf16"},
                                {ScalarType::kFloat16, "fp16"}};

std::vector<KernelCase> tile_cases() {
  std::vector<KernelCase> cases;
  for (const Measured measured : {Measured::kForward, Measured::kBackward}) {
    for (const NamedType& type : kTypes) {
      for (const std::int64_t head_dim : {64, 128}) {
        for (const bool is_causal : {false, true}) {
          KernelCase c{.measured = measured,
                       .dtype = type.dtype,
                       .head_dim = head_dim,
                       .is_causal = is_causal};
          c.name = std::string(measured == Measured::kForward ? "forward/" : "backward/") +
                   type.name + "/B2_H8_S1024_D" + std::to_string(head_dim) +
                   (is_causal ? "/causal" : "");
          cases.push_back(c);
        }
      }
      for (const std::int64_t head_dim : {32, 80, 96, 256}) {
        KernelCase c{.measured = measured,
                     .dtype = type.dtype,
                     .q_len = 509,
                     .kv_len = 509,
                     .head_dim = head_dim};
        c.name = std::string(measured == Measured::kForward ? "forward/" : "backward/") +
                 type.name + "/B2_H8_S509_D" + std::to_string(head_dim);
        cases.push_back(c);
      }
    }
  }
  return cases;
}

std::vector<KernelCase> decode_cases() {
  std::vector<KernelCase> cases;
  for (const NamedType& type : kTypes) {
    for (const std::int64_t query_heads : {8, 32}) {
      KernelCase c{.dtype = type.dtype,
                   .query_heads = query_heads,
                   .q_len = 1,
                   .kv_len = 8192,
                   .head_dim = 128};
      c.name = std::string("decode/") + type.name + "/B2_H" + std::to_string(query_heads) +
               "_KV8_S8192_D128";
      cases.push_back(c);
    }
  }
  return cases;
}

void run_case(benchmark::State& state, const KernelCase& kernel_case, int threads,
              const Ceilings& ceilings) {
  KernelCall call(kernel_case);
  const OpenMpTaskRunner runner(threads);
  const torch_ext::KernelTable& table = torch_ext::kernel_table();
  const char* path = call.run(table, runner);  // warms up caches, threads and the clock
  for (auto _ : state) {
    benchmark::DoNotOptimize(path = call.run(table, runner));
    benchmark::ClobberMemory();
  }
  using benchmark::Counter;
  const auto per_second = Counter::kIsIterationInvariantRate;
  state.SetLabel(path);
  state.counters["GF/s"] = Counter(1e-9 * kernel_case.flops(), per_second);
  if (kernel_case.q_len == 1) {
    state.counters["GB/s"] = Counter(1e-9 * kernel_case.kv_bytes(), per_second);
    state.counters["of_read"] =
        Counter(1e-9 * kernel_case.kv_bytes() / ceilings.read_gbytes, per_second);
    return;
  }
  const bool dot_products = kernel_case.dtype == ScalarType::kBFloat16 && ceilings.bf16_gflops > 0;
  const double peak = dot_products ? ceilings.bf16_gflops : ceilings.fma_gflops;
  state.counters["of_peak"] = Counter(1e-9 * kernel_case.flops() / peak, per_second);
}

/// Takes --threads=N out of the arguments.
int take_threads(int& argc, char** argv) {
  constexpr std::string_view kFlag = "--threads=";
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]).substr(0, kFlag.size()) == kFlag) {
      threads = std::atoi(argv[i] + kFlag.size());
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  return threads;
}

int run(int argc, char** argv) {
  const int threads = take_threads(argc, argv);
  if (threads < 1) {
    std::fprintf(stderr, "bench_kernels: --threads takes a number of at least 1\n");
    return 2;
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;

  const std::string capability(torch_ext::capability_name(torch_ext::current_capability()));
  const PeakCapability peak = parse_peak_capability(capability);
  const Ceilings ceilings{.fma_gflops = measure_fma_gflops(peak, threads),
                          .bf16_gflops = measure_bf16_gflops(peak, threads),
                          .read_gbytes = measure_read_gbytes(threads)};
  std::fprintf(stderr, "%s, %d threads: multiply-add %.1f GF/s", capability.c_str(), threads,
               ceilings.fma_gflops);
  if (ceilings.bf16_gflops > 0) std::fprintf(stderr, ", vdpbf16ps %.1f GF/s", ceilings.bf16_gflops);
  std::fprintf(stderr, ", reading %.1f GB/s\n", ceilings.read_gbytes);

  std::vector<KernelCase> cases = tile_cases();
  for (KernelCase& c : decode_cases()) cases.push_back(std::move(c));
  for (const KernelCase& c : cases) {
    benchmark::RegisterBenchmark(
        c.name.c_str(),
        [c, threads, ceilings](benchmark::State& state) { run_case(state, c, threads, ceilings); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace
}  // namespace torch_ext_bench

int main(int argc, char** argv) try {
  return torch_ext_bench::run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "bench_kernels: %s\n", error.what());
  return 2;
}
