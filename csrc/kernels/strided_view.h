// Memory as the kernels see it: a pointer, an element type and strides. Nothing here knows torch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace torch_ext {

/// Element types that kernels read and write.
enum class ScalarType : std::uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBool,
  kInt8,
  kFloat8E4M3,  // finite: no infinities, NaN is 0x7F
};

constexpr std::size_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
      return 8;
    case ScalarType::kFloat32:
      return 4;
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16:
      return 2;
    case ScalarType::kBool:
    case ScalarType::kInt8:
    case ScalarType::kFloat8E4M3:
      return 1;
  }
  return 0;
}

/// Leading dimensions in front of (head, row, col). Four cover every input up to 7-D without a
/// copy.
inline constexpr int kMaxBatchDims = 4;

/// A tensor of shape (batch..., head, row, col) with any strides, in elements; 0 broadcasts.
template <typename Pointer>
struct BasicStridedView {
  Pointer data = nullptr;
  std::array<std::int64_t, kMaxBatchDims> batch_strides{};
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 0;
};

using StridedView = BasicStridedView<void*>;
using ConstStridedView = BasicStridedView<const void*>;

// Inlined everywhere: as a weak symbol out of a file compiled for one instruction set it would
// carry those instructions into all others.
#define TORCH_EXT_ALWAYS_INLINE inline __attribute__((always_inline))

/// Element offset of flat batch index `batch` (row-major over `batch_sizes`) and `head`.
template <typename Pointer>
constexpr TORCH_EXT_ALWAYS_INLINE std::int64_t slice_offset(
    const BasicStridedView<Pointer>& view,
    const std::array<std::int64_t, kMaxBatchDims>& batch_sizes, std::int64_t batch,
    std::int64_t head) {
  std::int64_t offset = head * view.head_stride;
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    offset += batch % batch_sizes[dim] * view.batch_strides[dim];
    batch /= batch_sizes[dim];
  }
  return offset;
}

}  // namespace torch_ext
