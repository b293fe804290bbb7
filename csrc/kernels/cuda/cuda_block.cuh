// The hardware as programs see it (device_program.h), on CuTe's atoms.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "device_program.h"

namespace torch_ext::cuda {

extern __shared__ __align__(1024) char dynamic_shared_memory[];

class CudaBlock {
 public:
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kWideAtomics = true;  // red.global.add.v4.f32
#else
  static constexpr bool kWideAtomics = false;
#endif

  TORCH_EXT_DEVICE std::int64_t index() const { return blockIdx.x; }
  TORCH_EXT_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  TORCH_EXT_DEVICE void sync() { __syncthreads(); }
  /// The same value, computed again: what hangs on it is not kept in registers meanwhile.
  TORCH_EXT_DEVICE std::int64_t anew(std::int64_t value) {
    asm volatile("" : "+l"(value));
    return value;
  }
  TORCH_EXT_DEVICE int anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
  }

  /// Shared memory is addressed by byte offsets: 32-bit arithmetic.
  template <typename T>
  TORCH_EXT_DEVICE T& shared(std::uint32_t offset) {
    return *reinterpret_cast<T*>(dynamic_shared_memory + offset);
  }

  template <typename T>
  TORCH_EXT_DEVICE T shuffle_xor(T value, int lanes) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  }
  template <typename T>
  TORCH_EXT_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
  }
  TORCH_EXT_DEVICE bool any(bool value) { return __any_sync(0xFFFFFFFFu, value); }

  /// d (16, 8) += a (16, 16) b (16, 8); half the depth of Tf32.
  template <typename Element>
  TORCH_EXT_DEVICE void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                 std::uint32_t b1) {
    if constexpr (std::is_same_v<Element, Tf32>) {
      multiply_tf32(d, a, b0, b1);
    } else {
      using Atom =
          std::conditional_t<std::is_same_v<Element, Bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                             cute::SM80_16x8x16_F32F16F16F32_TN>;
      Atom::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
    }
  }

  /// d (16, 8) += a (16, 8) b (8, 8), rounded to TF32: the hardware itself would cut.
  TORCH_EXT_DEVICE void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                      std::uint32_t b1) {
    cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(d[0], d[1], d[2], d[3], tf32(a[0]), tf32(a[1]),
                                             tf32(a[2]), tf32(a[3]), tf32(b0), tf32(b1), d[0], d[1],
                                             d[2], d[3]);
  }

  /// Four 8 x 8 matrices of 16-bit elements, lane i naming row i % 8 of matrix i / 8. Lane i gets
  /// elements 2 * (i % 4) and the next of row i / 4.
  TORCH_EXT_DEVICE void load_matrices(std::uint32_t (&r)[4], std::uint32_t row) {
    cute::SM75_U32x4_LDSM_N::copy(shared<cute::uint128_t>(row), r[0], r[1], r[2], r[3]);
  }
  /// ... of column i / 4.
  TORCH_EXT_DEVICE void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t row) {
    cute::SM75_U16x8_LDSM_T::copy(shared<cute::uint128_t>(row), r[0], r[1], r[2], r[3]);
  }

  /// 16 bytes, in the background; zeros where !valid, and `source` is not read then.
  TORCH_EXT_DEVICE void copy_async(std::uint32_t target, const void* source, bool valid) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
        *static_cast<const cute::uint128_t*>(source), shared<cute::uint128_t>(target), valid);
  }
  TORCH_EXT_DEVICE void commit_copies() { cute::cp_async_fence(); }
  /// Until at most kNewest of this thread's committed groups are under way.
  template <int kNewest>
  TORCH_EXT_DEVICE void wait_copies() {
    cute::cp_async_wait<kNewest>();
  }

  TORCH_EXT_DEVICE void add_global(float* target, float value) { atomicAdd(target, value); }
  TORCH_EXT_DEVICE void add_global(float* target, const float (&value)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(value[0]),
                 "f"(value[1]), "f"(value[2]), "f"(value[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) atomicAdd(target + i, value[i]);
#endif
  }

  /// 2^x to two units in the last place; 0 below the normal numbers.
  TORCH_EXT_DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
  TORCH_EXT_DEVICE float exp2(float x) { return exp2f(x); }
  TORCH_EXT_DEVICE double exp2(double x) { return ::exp2(x); }
  /// a * b, rounded before a sum takes it: no fused multiply-add.
  TORCH_EXT_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
  TORCH_EXT_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
  TORCH_EXT_DEVICE float log(float x) { return logf(x); }
  TORCH_EXT_DEVICE double log(double x) { return ::log(x); }

  /// Two elements in one register, `low` at the lower address.
  TORCH_EXT_DEVICE std::uint32_t pack(Bf16, float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
  TORCH_EXT_DEVICE std::uint32_t pack(Fp16, float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
  TORCH_EXT_DEVICE float widen(Bf16, std::uint16_t bits) {
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  }
  TORCH_EXT_DEVICE float widen(Fp16, std::uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }

 private:
  TORCH_EXT_DEVICE static std::uint32_t tf32(std::uint32_t bits) {
    std::uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "r"(bits));
    return result;
  }
};

}  // namespace torch_ext::cuda
