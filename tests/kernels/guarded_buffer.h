// Memory in which a kernel cannot go astray unnoticed: the bytes end at an inaccessible page (or
// begin after one), and what lies between them and the other page must not change.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace torch_ext::testing {

/// Where the bytes touch an inaccessible page: reads and writes beyond that end are a crash.
enum class GuardSide { kBack, kFront };

class GuardedBuffer {
 public:
  /// What fresh memory holds: a NaN in every floating-point type.
  static constexpr std::uint8_t kPoison = 0xFF;

  /// With GuardSide::kBack the first byte is aligned to the largest power of two <= `alignment`
  /// only if `num_bytes` is a multiple of `alignment`; otherwise up to `alignment` - 1 bytes before
  /// the page are checked for changes instead.
  explicit GuardedBuffer(std::size_t num_bytes, GuardSide side = GuardSide::kBack,
                         std::size_t alignment = 1)
      : num_bytes_(num_bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    accessible_bytes_ = (num_bytes + page - 1) / page * page;
    if (accessible_bytes_ == 0) accessible_bytes_ = page;
    mapped_bytes_ = accessible_bytes_ + 2 * page;
    mapping_ = static_cast<std::uint8_t*>(
        mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    accessible_ = mapping_ + page;
    if (mprotect(accessible_, accessible_bytes_, PROT_READ | PROT_WRITE) != 0) {
      munmap(mapping_, mapped_bytes_);
      throw std::bad_alloc();
    }
    const std::size_t room = accessible_bytes_ - num_bytes;
    bytes_ = accessible_ + (side == GuardSide::kBack ? room / alignment * alignment : 0);
    std::memset(accessible_, kPoison, accessible_bytes_);
  }

  ~GuardedBuffer() { munmap(mapping_, mapped_bytes_); }

  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  void* data() { return bytes_; }
  const void* data() const { return bytes_; }
  std::size_t size() const { return num_bytes_; }

  void poison() { std::memset(bytes_, kPoison, num_bytes_); }

  /// Whether the accessible bytes around the buffer still hold what they held.
  bool surroundings_intact() const {
    return all_poison(accessible_, bytes_) &&
           all_poison(bytes_ + num_bytes_, accessible_ + accessible_bytes_);
  }

  static bool all_poison(const std::uint8_t* begin, const std::uint8_t* end) {
    for (; begin != end; ++begin) {
      if (*begin != kPoison) return false;
    }
    return true;
  }

 private:
  std::size_t num_bytes_;
  std::size_t accessible_bytes_ = 0;
  std::size_t mapped_bytes_ = 0;
  std::uint8_t* mapping_ = nullptr;
  std::uint8_t* accessible_ = nullptr;
  std::uint8_t* bytes_ = nullptr;
};

}  // namespace torch_ext::testing
