#include "device_mirror.h"

#if defined(TORCH_EXT_CUDA_TESTS)
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace torch_ext::testing {
namespace {

constexpr std::uintptr_t kPage = 256;       // alignment that is kept
constexpr unsigned char kUntouched = 0xFF;  // NaN in every floating-point type

}  // namespace

bool has_cuda_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

void check_cuda(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::abort();
}

DeviceMirror::DeviceMirror() : separate_(std::getenv("TORCH_EXT_TEST_SEPARATE") != nullptr) {}

DeviceMirror::~DeviceMirror() {
  for (void* allocation : allocations_) cudaFree(allocation);
}

void DeviceMirror::add(const void* host, std::size_t bytes, std::size_t width) {
  if (host == nullptr || bytes == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(host);
  ranges_.push_back({begin, begin + bytes, width});
}

void DeviceMirror::upload() {
  std::sort(ranges_.begin(), ranges_.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> merged;
  for (const Range& range : ranges_) {
    if (!merged.empty() && range.begin < merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
      merged.back().width = std::max(merged.back().width, range.width);
    } else {
      merged.push_back(range);
    }
  }
  ranges_ = std::move(merged);
  std::uintptr_t total = 0;
  for (Range& range : ranges_) {
    range.device = total + range.begin % kPage / range.width * range.width;
    total = (range.device + (range.end - range.begin) + 2 * kPage) / kPage * kPage;
  }
  if (separate_) {
    for (Range& range : ranges_) {
      const std::uintptr_t offset = range.device % kPage;
      const std::size_t bytes = range.end - range.begin;
      void* allocation = nullptr;
      check_cuda(cudaMalloc(&allocation, offset + bytes), "cudaMalloc");
      allocations_.push_back(allocation);
      range.device = reinterpret_cast<std::uintptr_t>(allocation) + offset;
      check_cuda(
          cudaMemcpy(reinterpret_cast<void*>(range.device),
                     reinterpret_cast<const void*>(range.begin), bytes, cudaMemcpyHostToDevice),
          "upload");
    }
    return;
  }
  image_.assign(std::max<std::size_t>(total, 1), kUntouched);
  for (const Range& range : ranges_) {
    std::memcpy(image_.data() + range.device, reinterpret_cast<const void*>(range.begin),
                range.end - range.begin);
  }
  void* allocation = nullptr;
  check_cuda(cudaMalloc(&allocation, image_.size()), "cudaMalloc");
  allocations_.push_back(allocation);
  check_cuda(cudaMemcpy(allocation, image_.data(), image_.size(), cudaMemcpyHostToDevice),
             "upload");
  for (Range& range : ranges_) range.device += reinterpret_cast<std::uintptr_t>(allocation);
}

const void* DeviceMirror::device_address(const void* host) const {
  const auto address = reinterpret_cast<std::uintptr_t>(host);
  const auto behind =
      std::upper_bound(ranges_.begin(), ranges_.end(), address,
                       [](std::uintptr_t a, const Range& range) { return a < range.begin; });
  if (host == nullptr || behind == ranges_.begin() || address >= (behind - 1)->end) return nullptr;
  return reinterpret_cast<const void*>((behind - 1)->device + (address - (behind - 1)->begin));
}

void DeviceMirror::download() {
  check_cuda(cudaDeviceSynchronize(), "the kernel");
  if (separate_) {
    for (const Range& range : ranges_) {
      check_cuda(cudaMemcpy(reinterpret_cast<void*>(range.begin),
                            reinterpret_cast<const void*>(range.device), range.end - range.begin,
                            cudaMemcpyDeviceToHost),
                 "download");
    }
    return;
  }
  check_cuda(cudaMemcpy(image_.data(), allocations_[0], image_.size(), cudaMemcpyDeviceToHost),
             "download");
  std::size_t gap = 0;
  const auto all_untouched = [&](std::size_t end) {
    return std::all_of(image_.begin() + static_cast<std::ptrdiff_t>(gap),
                       image_.begin() + static_cast<std::ptrdiff_t>(end),
                       [](unsigned char byte) { return byte == kUntouched; });
  };
  const auto base = reinterpret_cast<std::uintptr_t>(allocations_[0]);
  bool intact = true;
  for (const Range& range : ranges_) {
    intact = intact && all_untouched(range.device - base);
    gap = range.device - base + (range.end - range.begin);
    std::memcpy(reinterpret_cast<void*>(range.begin), image_.data() + (range.device - base),
                range.end - range.begin);
  }
  EXPECT_TRUE(intact && all_untouched(image_.size())) << "something between tensors was written";
}

}  // namespace torch_ext::testing
#endif
