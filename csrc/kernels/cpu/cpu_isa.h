// Which instruction set the CPU kernels use: the best this machine has, or less where asked.
#pragma once

#include <cstdint>
#include <string_view>

namespace torch_ext {

/// In increasing order of capability; each includes the ones before it.
enum class CpuCapability : std::uint8_t { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

/// "default", "avx2", "avx512", "avx512_bf16": the names that TORCH_EXT_CPU_CAPABILITY takes.
std::string_view capability_name(CpuCapability capability);

/// The best this processor and operating system support.
CpuCapability supported_capability();

/// The one in use: supported_capability(), limited by the environment variable
/// TORCH_EXT_CPU_CAPABILITY (empty: unset) when first asked, or what set_capability() set since.
/// Throws std::invalid_argument for a value of the variable that names no capability.
CpuCapability current_capability();

/// Limits the kernels to `capability` from the next call on; throws std::invalid_argument when the
/// machine does not have it.
void set_capability(CpuCapability capability);

/// Parses a name; throws std::invalid_argument naming what it takes.
CpuCapability parse_capability(std::string_view name);

}  // namespace torch_ext
