// A (batch, head, row, col) tensor of any dtype and layout in guarded memory, read and written as
// doubles.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/strided_view.h"

namespace torch_ext::testing {

struct TensorExtent {
  std::array<std::int64_t, kMaxBatchDims> batch_sizes{1, 1, 1, 1};
  std::int64_t heads = 1;
  std::int64_t rows = 0;
  std::int64_t cols = 0;

  std::int64_t batch() const {
    return batch_sizes[0] * batch_sizes[1] * batch_sizes[2] * batch_sizes[3];
  }
  std::int64_t count() const { return batch() * heads * rows * cols; }
};

/// Order of the dimensions in memory, outermost first, and what differs from dense strides.
enum class Layout {
  kBhsd,            // (batch, head, row, col), contiguous
  kBshd,            // (batch, row, head, col): a projection's output, viewed as heads
  kSbhd,            // (row, batch, head, col): sequence first
  kHbsd,            // (head, batch, row, col), batch dimensions reversed
  kPaddedRows,      // kBhsd with 3 unused elements after each row and 1 before the first
  kTransposed,      // (batch, head, col, row): consecutive columns lie apart
  kEverySecondCol,  // kBhsd with a column stride of 2
  kExpandedBatch,   // kBhsd with batch strides of 0
  kExpandedHeads,   // kBhsd with a head stride of 0
  kExpandedRows,    // kBhsd with a row stride of 0
  kExpandedAll,     // one element with strides of 0, as the gradient of a sum
};

const char* layout_name(Layout layout);

/// Whether distinct elements have distinct places, so that a kernel may write there.
bool layout_is_writable(Layout layout);

/// Dimensions that are stored once and repeated through a stride of 0.
struct Broadcast {
  bool batch = false;  // every batch dimension
  bool heads = false;
  bool rows = false;
  bool cols = false;
  std::array<bool, kMaxBatchDims> batch_dims{};  // single ones
};

class StridedTensor {
 public:
  /// No tensor: a null view.
  StridedTensor() = default;

  StridedTensor(ScalarType type, const TensorExtent& extent, Layout layout = Layout::kBhsd,
                GuardSide side = GuardSide::kBack, Broadcast broadcast = {});

  /// A window of `storage`: strides and offset in elements.
  StridedTensor(ScalarType type, const TensorExtent& extent, std::shared_ptr<GuardedBuffer> storage,
                const StridedView& strides, std::int64_t offset);

  explicit operator bool() const { return storage_ != nullptr; }
  ScalarType type() const { return type_; }
  const TensorExtent& extent() const { return extent_; }
  const std::shared_ptr<GuardedBuffer>& storage() const { return storage_; }

  /// Whether its elements fill its storage, each in a place of its own.
  bool is_dense() const;

  StridedView view() const;
  ConstStridedView const_view() const;

  double get(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col) const;
  void set(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col, double value);

  /// Calls `value(batch, head, row, col)` for each logical element; elements that share a place get
  /// the last one.
  void fill(
      const std::function<double(std::int64_t, std::int64_t, std::int64_t, std::int64_t)>& value);

  /// In logical order, row-major.
  std::vector<double> values() const;

  /// The bytes of the storage.
  std::vector<std::uint8_t> bytes() const;

  /// A contiguous tensor of the same values and another dtype.
  StridedTensor as(ScalarType type) const;

 private:
  /// visit(batch, head, row, col, place in the storage) in logical order.
  template <typename Visit>
  void for_each_element(const Visit& visit) const {
    for (std::int64_t batch = 0; batch < extent_.batch(); ++batch) {
      for (std::int64_t head = 0; head < extent_.heads; ++head) {
        const std::int64_t base = offset(batch, head, 0, 0);
        for (std::int64_t row = 0; row < extent_.rows; ++row) {
          for (std::int64_t col = 0; col < extent_.cols; ++col) {
            visit(batch, head, row, col, base + row * view_.row_stride + col * view_.col_stride);
          }
        }
      }
    }
  }

  std::int64_t offset(std::int64_t batch, std::int64_t head, std::int64_t row,
                      std::int64_t col) const;

  ScalarType type_ = ScalarType::kFloat32;
  TensorExtent extent_{};
  std::shared_ptr<GuardedBuffer> storage_;
  StridedView view_{};  // data is null: the storage and base_ say where it is
  std::int64_t base_ = 0;
};

/// Whether every byte of the tensors' storages that belongs to none of them is still poison, around
/// the storages too. Tensors may share a storage.
bool gaps_intact(const std::vector<const StridedTensor*>& tensors);

}  // namespace torch_ext::testing
