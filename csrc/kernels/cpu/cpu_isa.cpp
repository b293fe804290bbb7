#include "cpu_isa.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace torch_ext {
namespace {

constexpr const char* kVariable = "TORCH_EXT_CPU_CAPABILITY";

constexpr std::array<std::string_view, 4> kNames{"default", "avx2", "avx512", "avx512_bf16"};

CpuCapability detect() {
#if defined(__x86_64__)
  // GCC's checks ask the operating system (XGETBV) whether it saves the wide registers, too.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return CpuCapability::kDefault;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return CpuCapability::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? CpuCapability::kAvx512Bf16 : CpuCapability::kAvx512;
#else
  return CpuCapability::kDefault;
#endif
}

std::atomic<CpuCapability>& capability_in_use() {
  static std::atomic<CpuCapability> capability{[] {
    const char* limit = std::getenv(kVariable);
    const CpuCapability supported = supported_capability();
    if (limit == nullptr || *limit == '\0') return supported;
    const CpuCapability wanted = parse_capability(limit);
    return wanted < supported ? wanted : supported;
  }()};
  return capability;
}

}  // namespace

std::string_view capability_name(CpuCapability capability) {
  return kNames[static_cast<std::size_t>(capability)];
}

CpuCapability supported_capability() {
  static const CpuCapability supported = detect();
  return supported;
}

CpuCapability current_capability() { return capability_in_use().load(std::memory_order_relaxed); }

void set_capability(CpuCapability capability) {
  if (capability > supported_capability()) {
    throw std::invalid_argument("torch_ext: this processor has no " +
                                std::string(capability_name(capability)) + "; its best is " +
                                std::string(capability_name(supported_capability())));
  }
  capability_in_use().store(capability, std::memory_order_relaxed);
}

CpuCapability parse_capability(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<CpuCapability>(i);
  }
  std::string message = std::string(kVariable) + " takes ";
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    message += std::string(i == 0                   ? ""
                           : i + 1 == kNames.size() ? " or "
                                                    : ", ") +
               std::string(kNames[i]);
  }
  throw std::invalid_argument(message + "; got '" + std::string(name) + "'");
}

}  // namespace torch_ext
