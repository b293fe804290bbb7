#include "strided_tensor.h"

#include <map>
#include <utility>

#include "kernels/reference/element_access.h"

namespace torch_ext::testing {
namespace {

constexpr int kHeadDim = kMaxBatchDims;
constexpr int kRowDim = kMaxBatchDims + 1;
constexpr int kColDim = kMaxBatchDims + 2;
constexpr int kNumDims = kMaxBatchDims + 3;

using DimArray = std::array<std::int64_t, kNumDims>;

DimArray dims_of(const TensorExtent& extent) {
  DimArray dims{};
  for (int dim = 0; dim < kMaxBatchDims; ++dim) dims[dim] = extent.batch_sizes[dim];
  dims[kHeadDim] = extent.heads;
  dims[kRowDim] = extent.rows;
  dims[kColDim] = extent.cols;
  return dims;
}

/// Dimensions from the outermost to the innermost.
std::array<int, kNumDims> memory_order(Layout layout) {
  switch (layout) {
    case Layout::kBshd:
      return {0, 1, 2, 3, kRowDim, kHeadDim, kColDim};
    case Layout::kSbhd:
      return {kRowDim, 0, 1, 2, 3, kHeadDim, kColDim};
    case Layout::kHbsd:
      return {kHeadDim, 3, 2, 1, 0, kRowDim, kColDim};
    case Layout::kTransposed:
      return {0, 1, 2, 3, kHeadDim, kColDim, kRowDim};
    default:
      return {0, 1, 2, 3, kHeadDim, kRowDim, kColDim};
  }
}

Broadcast with_layout(Broadcast broadcast, Layout layout) {
  const bool all = layout == Layout::kExpandedAll;
  broadcast.batch |= all || layout == Layout::kExpandedBatch;
  broadcast.heads |= all || layout == Layout::kExpandedHeads;
  broadcast.rows |= all || layout == Layout::kExpandedRows;
  broadcast.cols |= all;
  for (bool& dim : broadcast.batch_dims) dim |= broadcast.batch;
  return broadcast;
}

}  // namespace

const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::kBhsd:
      return "bhsd";
    case Layout::kBshd:
      return "bshd";
    case Layout::kSbhd:
      return "sbhd";
    case Layout::kHbsd:
      return "hbsd";
    case Layout::kPaddedRows:
      return "padded_rows";
    case Layout::kTransposed:
      return "transposed";
    case Layout::kEverySecondCol:
      return "every_second_col";
    case Layout::kExpandedBatch:
      return "expanded_batch";
    case Layout::kExpandedHeads:
      return "expanded_heads";
    case Layout::kExpandedRows:
      return "expanded_rows";
    case Layout::kExpandedAll:
      return "expanded_all";
  }
  return "?";
}

bool layout_is_writable(Layout layout) {
  return layout != Layout::kExpandedBatch && layout != Layout::kExpandedHeads &&
         layout != Layout::kExpandedRows && layout != Layout::kExpandedAll;
}

StridedTensor::StridedTensor(ScalarType type, const TensorExtent& extent, Layout layout,
                             GuardSide side, Broadcast broadcast)
    : type_(type), extent_(extent) {
  broadcast = with_layout(broadcast, layout);
  DimArray stored = dims_of(extent);
  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    if (broadcast.batch_dims[dim]) stored[dim] = 1;
  }
  if (broadcast.heads) stored[kHeadDim] = 1;
  if (broadcast.rows) stored[kRowDim] = 1;
  if (broadcast.cols) stored[kColDim] = 1;

  DimArray strides{};
  std::int64_t step = layout == Layout::kEverySecondCol ? 2 : 1;
  const std::array<int, kNumDims> order = memory_order(layout);
  for (int place = kNumDims - 1; place >= 0; --place) {
    const int dim = order[place];
    strides[dim] = step;
    step *= stored[dim];
    if (layout == Layout::kPaddedRows && dim == kColDim) step += 3;
  }
  base_ = layout == Layout::kPaddedRows ? 1 : 0;

  for (int dim = 0; dim < kMaxBatchDims; ++dim) {
    view_.batch_strides[dim] = broadcast.batch_dims[dim] ? 0 : strides[dim];
  }
  view_.head_stride = broadcast.heads ? 0 : strides[kHeadDim];
  view_.row_stride = broadcast.rows ? 0 : strides[kRowDim];
  view_.col_stride = broadcast.cols ? 0 : strides[kColDim];

  // Up to the last element and no further: a kernel that reads the padding of the last row fails.
  std::int64_t num_elements = 1 + base_;
  for (int dim = 0; dim < kNumDims; ++dim) {
    if (stored[dim] == 0) num_elements = 0;
  }
  for (int dim = 0; dim < kNumDims && num_elements != 0; ++dim) {
    num_elements += (stored[dim] - 1) * strides[dim];
  }
  storage_ = std::make_shared<GuardedBuffer>(
      static_cast<std::size_t>(num_elements) * element_size(type), side);
}

StridedTensor::StridedTensor(ScalarType type, const TensorExtent& extent,
                             std::shared_ptr<GuardedBuffer> storage, const StridedView& strides,
                             std::int64_t offset)
    : type_(type), extent_(extent), storage_(std::move(storage)), view_(strides), base_(offset) {}

bool StridedTensor::is_dense() const {
  return storage_->size() == static_cast<std::size_t>(extent_.count()) * element_size(type_);
}

StridedView StridedTensor::view() const {
  if (!storage_) return {};
  StridedView view = view_;
  if (storage_->size() == 0) return view;  // as an empty torch tensor: no address
  view.data =
      static_cast<char*>(storage_->data()) + base_ * static_cast<std::int64_t>(element_size(type_));
  return view;
}

ConstStridedView StridedTensor::const_view() const {
  const StridedView mutable_view = view();
  return {mutable_view.data, mutable_view.batch_strides, mutable_view.head_stride,
          mutable_view.row_stride, mutable_view.col_stride};
}

std::int64_t StridedTensor::offset(std::int64_t batch, std::int64_t head, std::int64_t row,
                                   std::int64_t col) const {
  // Written out rather than slice_offset(): the kernels under test use that one.
  std::int64_t result =
      base_ + head * view_.head_stride + row * view_.row_stride + col * view_.col_stride;
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    result += batch % extent_.batch_sizes[dim] * view_.batch_strides[dim];
    batch /= extent_.batch_sizes[dim];
  }
  return result;
}

double StridedTensor::get(std::int64_t batch, std::int64_t head, std::int64_t row,
                          std::int64_t col) const {
  return reference::load_element(storage_->data(), offset(batch, head, row, col), type_);
}

void StridedTensor::set(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col,
                        double value) {
  reference::store_element(storage_->data(), offset(batch, head, row, col), type_, value);
}

void StridedTensor::fill(
    const std::function<double(std::int64_t, std::int64_t, std::int64_t, std::int64_t)>& value) {
  for_each_element([&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col,
                       std::int64_t place) {
    reference::store_element(storage_->data(), place, type_, value(batch, head, row, col));
  });
}

std::vector<double> StridedTensor::values() const {
  std::vector<double> result;
  result.reserve(static_cast<std::size_t>(extent_.count()));
  for_each_element([&](auto, auto, auto, auto, std::int64_t place) {
    result.push_back(reference::load_element(storage_->data(), place, type_));
  });
  return result;
}

std::vector<std::uint8_t> StridedTensor::bytes() const {
  if (!storage_) return {};
  const auto* begin = static_cast<const std::uint8_t*>(storage_->data());
  return {begin, begin + storage_->size()};
}

StridedTensor StridedTensor::as(ScalarType type) const {
  StridedTensor result(type, extent_);
  std::int64_t target = 0;
  for_each_element([&](auto, auto, auto, auto, std::int64_t place) {
    reference::store_element(result.storage_->data(), target++, type,
                             reference::load_element(storage_->data(), place, type_));
  });
  return result;
}

bool gaps_intact(const std::vector<const StridedTensor*>& tensors) {
  std::map<const GuardedBuffer*, std::vector<bool>> covered;
  for (const StridedTensor* tensor : tensors) {
    if (!*tensor) continue;
    if (tensor->is_dense()) {  // no gaps inside: the common case, and the slow one below
      if (!tensor->storage()->surroundings_intact()) return false;
      continue;
    }
    std::vector<bool>& bytes = covered[tensor->storage().get()];
    bytes.resize(tensor->storage()->size());
    const auto width = static_cast<std::int64_t>(element_size(tensor->type()));
    const auto* origin = static_cast<const char*>(tensor->storage()->data());
    if (bytes.empty()) continue;
    const StridedView view = tensor->view();
    // A place that is repeated exists even if it is repeated zero times.
    TensorExtent extent = tensor->extent();
    for (int dim = 0; dim < kMaxBatchDims; ++dim) {
      if (view.batch_strides[dim] == 0) extent.batch_sizes[dim] = 1;
    }
    if (view.head_stride == 0) extent.heads = 1;
    if (view.row_stride == 0) extent.rows = 1;
    if (view.col_stride == 0) extent.cols = 1;
    for (std::int64_t batch = 0; batch < extent.batch(); ++batch) {
      for (std::int64_t head = 0; head < extent.heads; ++head) {
        const std::int64_t base = slice_offset(view, extent.batch_sizes, batch, head);
        for (std::int64_t row = 0; row < extent.rows; ++row) {
          for (std::int64_t col = 0; col < extent.cols; ++col) {
            const std::int64_t element = base + row * view.row_stride + col * view.col_stride;
            const std::int64_t first =
                static_cast<const char*>(view.data) - origin + element * width;
            for (std::int64_t byte = first; byte < first + width; ++byte) bytes[byte] = true;
          }
        }
      }
    }
  }
  for (const auto& [storage, bytes] : covered) {
    if (!storage->surroundings_intact()) return false;
    const auto* data = static_cast<const std::uint8_t*>(storage->data());
    for (std::size_t byte = 0; byte < bytes.size(); ++byte) {
      if (!bytes[byte] && data[byte] != GuardedBuffer::kPoison) return false;
    }
  }
  return true;
}

}  // namespace torch_ext::testing
