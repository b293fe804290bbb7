// Device code that the host can run. A kernel is a program: a struct with
//   using Args = ...;                       passed by value
//   static constexpr int kThreads;          of a block
//   static constexpr int kSharedBytes;      of dynamic shared memory
//   static constexpr int kBlocksPerUnit;    resident at once, for the register budget
//   template <typename Block> static void run(Block& block, const Args& args);
// Whatever is hardware comes from the Block: CudaBlock in a kernel, an emulator in the tests, which
// runs all threads of a block on the host. So the index arithmetic, masks, pipelines and barriers
// that the GPU executes are those that the tests have executed.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define TORCH_EXT_DEVICE __device__ __forceinline__
#define TORCH_EXT_UNROLL _Pragma("unroll")
#define TORCH_EXT_NO_UNROLL _Pragma("unroll 1")
#else
#define TORCH_EXT_DEVICE inline
#define TORCH_EXT_UNROLL
#define TORCH_EXT_NO_UNROLL
#endif

namespace torch_ext::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr int kCopyBytes = 16;  // of one cp.async

/// 16-bit element types; the Block converts them.
struct Bf16 {};
struct Fp16 {};
/// float in memory, that tensor cores round to ten bits behind the point.
struct Tf32 {};

template <typename Element>
inline constexpr int kElementBytes = std::is_same_v<Element, Tf32> ? 4 : 2;

template <typename T>
TORCH_EXT_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
TORCH_EXT_DEVICE T max_of(T a, T b) {
  return a > b ? a : b;
}
/// One instruction. Of a NaN and a number, the number.
TORCH_EXT_DEVICE float max_of(float a, float b) { return __builtin_fmaxf(a, b); }

}  // namespace torch_ext::cuda
