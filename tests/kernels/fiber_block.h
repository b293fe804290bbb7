// A block of a GPU on the host: what device_program.h calls a Block. Threads are fibers that run
// until they wait for one another, so that warp-wide instructions and barriers mean what they mean
// on the device; warps run one after the other, in either order, from barrier to barrier.
//
// Stricter than the hardware where that finds mistakes: shared memory starts as NaN and is checked
// for bounds and alignment; an asynchronous copy spoils its target when it is issued and lands when
// it is waited for, not earlier; threads that part where they should act together are an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/cuda/device_program.h"

namespace torch_ext::testing {

class FiberBlock {
 public:
  static constexpr bool kWideAtomics = false;

  FiberBlock(std::int64_t index, int threads, int shared_bytes, bool backwards);
  ~FiberBlock();

  /// Runs `body` as every thread of the block.
  void run(const std::function<void()>& body);

  std::int64_t index() const { return index_; }
  int thread() const { return current_; }
  std::int64_t anew(std::int64_t value) const { return value; }
  int anew(int value) const { return value; }
  void sync();

  template <typename T>
  T& shared(std::uint32_t offset) {
    return *reinterpret_cast<T*>(shared_place(offset, sizeof(T), alignof(T)));
  }

  template <typename T>
  T shuffle_xor(T value, int lanes) {
    return shuffle(value, current_ % cuda::kWarpSize ^ lanes);
  }
  template <typename T>
  T shuffle(T value, int lane) {
    struct Slot {
      T value;
      int lane;
      T result;
    } slot{value, lane, {}};
    together("shuffle", &slot, [](void* const* slots) {
      for (int i = 0; i < cuda::kWarpSize; ++i) {
        auto* own = static_cast<Slot*>(slots[i]);
        own->result = static_cast<Slot*>(slots[own->lane])->value;
      }
    });
    return slot.result;
  }
  bool any(bool value);

  template <typename Element>
  void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (std::is_same_v<Element, cuda::Tf32>) {
      multiply_tf32_fragments(d, a, b0, b1);
    } else {
      multiply_fragments(d, a, b0, b1, decode_table(Element{}));
    }
  }
  void load_matrices(std::uint32_t (&r)[4], std::uint32_t row) { load_fragments(r, row, false); }
  void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t row) {
    load_fragments(r, row, true);
  }

  void copy_async(std::uint32_t target, const void* source, bool valid);
  void commit_copies();
  template <int kNewest>
  void wait_copies() {
    land_copies(kNewest);
  }

  void add_global(float* target, float value) { *target += value; }
  void add_global(float* target, const float (&value)[4]) {
    for (int i = 0; i < 4; ++i) target[i] += value[i];
  }

  float exp2_fast(float x) const { return exp2(x); }
  float product(float a, float b) const { return a * b; }
  double product(double a, double b) const { return a * b; }
  float exp2(float x) const { return std::exp2(x); }
  double exp2(double x) const { return std::exp2(x); }
  float log(float x) const { return std::log(x); }
  double log(double x) const { return std::log(x); }

  std::uint32_t pack(cuda::Bf16, float low, float high) const;
  std::uint32_t pack(cuda::Fp16, float low, float high) const;
  float widen(cuda::Bf16 type, std::uint16_t bits) const { return decode_table(type)[bits]; }
  float widen(cuda::Fp16 type, std::uint16_t bits) const { return decode_table(type)[bits]; }

 private:
  struct Fibers;
  using WarpAction = void (*)(void* const* slots);

  /// Waits until all lanes of the warp have come here, runs `action` once, and returns.
  void together(const char* what, void* slot, WarpAction action);
  void multiply_fragments(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                          std::uint32_t b1, const float* decode);
  void multiply_tf32_fragments(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                               std::uint32_t b1);
  void load_fragments(std::uint32_t (&r)[4], std::uint32_t row, bool transposed);
  char* shared_place(std::uint32_t offset, std::size_t size, std::size_t alignment);
  void land_copies(int newest);
  static const float* decode_table(cuda::Bf16);
  static const float* decode_table(cuda::Fp16);

  std::int64_t index_;
  int current_ = 0;
  bool backwards_;
  std::vector<std::uint64_t> shared_;
  std::size_t shared_bytes_;
  std::unique_ptr<Fibers> fibers_;
};

/// Runs programs on the host, their blocks one after the other.
struct FiberLauncher {
  template <typename Program>
  void launch(std::int64_t blocks, const typename Program::Args& args) const {
    for (std::int64_t index = 0; index < blocks; ++index) {
      FiberBlock block(index, Program::kThreads, Program::kSharedBytes, index % 2 == 1);
      block.run([&] { Program::run(block, args); });
    }
  }
  void clear(void* place, std::size_t bytes) const { std::memset(place, 0, bytes); }
};

}  // namespace torch_ext::testing
