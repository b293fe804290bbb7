// Host memory of a test, on the GPU for the time of one call: the kernels' tests then run on the
// device as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace torch_ext::testing {

/// Whether this machine has a GPU that the tests can use.
bool has_cuda_device();

/// Ends the program with CUDA's message where a call failed.
void check_cuda(int status, const char* what);

class DeviceMirror {
 public:
  DeviceMirror();
  ~DeviceMirror();
  DeviceMirror(const DeviceMirror&) = delete;
  DeviceMirror& operator=(const DeviceMirror&) = delete;

  /// Memory that the call reads or writes, of elements of `width` bytes. Null or empty: nothing.
  void add(const void* host, std::size_t bytes, std::size_t width);

  /// Copies everything that was added. What overlaps on the host overlaps on the device, and
  /// addresses keep their place within 256 bytes, except that elements lie at multiples of their
  /// width, for the hardware reads them nowhere else.
  void upload();

  /// The device's address of one in memory that was added.
  template <typename T>
  T* at(T* host) const {
    return static_cast<T*>(const_cast<void*>(device_address(host)));
  }

  /// Waits for the device, copies everything back, and fails the test where something beside it was
  /// written.
  void download();

 private:
  struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
    std::size_t width;
    std::uintptr_t device = 0;
  };

  const void* device_address(const void* host) const;

  // A range an allocation, for compute-sanitizer, which then sees reads beyond one, too.
  bool separate_;
  std::vector<Range> ranges_;
  std::vector<void*> allocations_;
  std::vector<unsigned char> image_;  // of the one allocation there is otherwise
};

}  // namespace torch_ext::testing
