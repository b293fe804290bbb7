#include "list_loops.h"

#include <algorithm>

namespace torch_ext {
namespace {

constexpr std::size_t kMaxOperands = 6;

struct Dim {
  std::int64_t size;
  std::int64_t strides[kMaxOperands];
};

/// Dimensions longer than 1, the first operand's smallest stride last, neighbours merged where
/// every operand allows it.
std::vector<Dim> merged_dims(std::initializer_list<const at::Tensor*> operands) {
  const at::Tensor& first = **operands.begin();
  std::vector<Dim> dims;
  for (std::int64_t dim = 0; dim < first.dim(); ++dim) {
    if (first.sizes()[dim] == 1) continue;
    Dim entry{first.sizes()[dim], {}};
    std::size_t k = 0;
    for (const at::Tensor* operand : operands) {
      entry.strides[k++] = operand == nullptr ? 0 : operand->strides()[dim];
    }
    dims.push_back(entry);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.strides[0] > b.strides[0]; });
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    const bool joins = !merged.empty() && [&] {
      for (std::size_t k = 0; k < operands.size(); ++k) {
        if (merged.back().strides[k] != dim.strides[k] * dim.size) return false;
      }
      return true;
    }();
    if (!joins) {
      merged.push_back(dim);
      continue;
    }
    const std::int64_t size = merged.back().size * dim.size;
    merged.back() = dim;
    merged.back().size = size;
  }
  return merged;
}

/// The kernels walk strips of the two innermost dimensions. Where another operand (a transposed
/// gradient) is contiguous along an outer one, that becomes the second: each cache line it reads is
/// used whole.
void move_contiguous_dim(std::vector<Dim>& dims, std::size_t num_operands) {
  if (dims.size() < 2) return;
  for (std::size_t k = 1; k < num_operands; ++k) {
    for (std::size_t dim = 0; dim + 1 < dims.size(); ++dim) {
      if (dims[dim].strides[k] != 1) continue;
      std::rotate(dims.begin() + static_cast<std::ptrdiff_t>(dim),
                  dims.begin() + static_cast<std::ptrdiff_t>(dim) + 1, dims.end() - 1);
      return;
    }
  }
}

}  // namespace

StridedLoop LoopArena::loop_of(std::initializer_list<const at::Tensor*> operands) {
  bool contiguous = true;
  for (const at::Tensor* operand : operands) {
    contiguous = contiguous && (operand == nullptr || operand->is_contiguous());
  }
  return contiguous ? StridedLoop{} : strided_loop(operands);
}

StridedLoop LoopArena::strided_loop(std::initializer_list<const at::Tensor*> operands) {
  std::vector<Dim> dims = merged_dims(operands);
  if (dims.empty() || (*operands.begin())->numel() == 0) return {};
  if (dims.size() == 1) {
    bool dense = true;
    std::size_t k = 0;
    for (const at::Tensor* operand : operands) {
      dense = dense && (operand == nullptr || dims[0].strides[k] == 1);
      ++k;
    }
    if (dense) return {};
  }
  move_contiguous_dim(dims, operands.size());
  std::vector<std::int64_t>& numbers = numbers_.emplace_back();
  for (const Dim& dim : dims) numbers.push_back(dim.size);
  for (std::size_t k = 0; k < operands.size(); ++k) {
    for (const Dim& dim : dims) numbers.push_back(dim.strides[k]);
  }
  return {static_cast<std::int32_t>(dims.size()), numbers.data(), numbers.data() + dims.size()};
}

}  // namespace torch_ext
