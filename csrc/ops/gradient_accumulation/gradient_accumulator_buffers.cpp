#include "gradient_accumulator_buffers.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>

#include "../tensor_storage.h"
#include "gradient_accumulator_calls.h"

namespace torch_ext {
namespace {

void accumulate(const std::vector<at::Tensor>& sums, const std::vector<at::Tensor>& grads,
                double beta) {
  if (sums.empty()) return;
  call_operator<GradAccumulate>(sums, grads, beta, OptionalTensor());
}

void check_sum(const at::Tensor& sum) {
  check_readable("GradientAccumulator", "a parameter's sum of gradients", sum);
}

}  // namespace

AccumulationBuffers::AccumulationBuffers(const std::vector<at::Tensor>& params,
                                         at::ScalarType dtype)
    : dtype_(dtype) {
  slots_.reserve(params.size());
  for (const at::Tensor& param : params) slots_.push_back(Slot{.param = param});
}

bool AccumulationBuffers::is_held_elsewhere(Slot& slot) {
  slot.shared = slot.shared && !is_only_owner(slot.sum);
  return slot.shared;
}

at::ScalarType AccumulationBuffers::dtype_of(const Slot& slot) const {
  return slot.param.scalar_type() == at::kDouble ? at::kDouble : dtype_;
}

bool AccumulationBuffers::fits(const Slot& slot) const {
  return slot.sum.scalar_type() == dtype_of(slot) && slot.sum.device() == slot.param.device() &&
         slot.sum.sizes() == slot.param.sizes();
}

void AccumulationBuffers::allocate(Slot& slot) const {
  slot.sum = at::empty_like(slot.param, slot.param.options().dtype(dtype_of(slot)));
  slot.adopted = false;
  slot.shared = false;
}

void AccumulationBuffers::convert(Slot& slot) const {
  TORCH_CHECK(slot.sum.sizes() == slot.param.sizes(),
              "torch_ext::GradientAccumulator: a parameter of sizes ", slot.sum.sizes(),
              " has been given sizes ", slot.param.sizes(),
              " while the window holds a gradient of it: call step() or reset() first");
  check_sum(slot.sum);
  slot.sum = slot.sum.to(slot.param.options().dtype(dtype_of(slot)).requires_grad(false));
  slot.shared = false;
}

AccumulationBuffers::Destination AccumulationBuffers::claim(std::size_t index) {
  Slot& slot = slots_[index];
  if (!slot.written) {
    if (!slot.sum.defined() || is_held_elsewhere(slot) || !fits(slot)) allocate(slot);
    slot.written = true;
    return {slot.sum, 0.0};
  }
  if (!fits(slot)) convert(slot);
  if (is_held_elsewhere(slot)) {
    check_sum(slot.sum);
    slot.sum = slot.sum.clone();
    slot.shared = false;
  }
  slot.added_to = true;
  return {slot.sum, 1.0};
}

void AccumulationBuffers::add(const std::vector<std::size_t>& indices,
                              std::vector<at::Tensor> grads) {
  std::vector<at::Tensor> first_sums;
  std::vector<at::Tensor> first_grads;
  std::vector<at::Tensor> sums;
  std::vector<at::Tensor> more_grads;
  for (std::size_t k = 0; k < indices.size(); ++k) {
    Slot& slot = slots_[indices[k]];
    at::Tensor& grad = grads[k];
    if (!slot.written && grad.scalar_type() == dtype_of(slot) && !grad.requires_grad() &&
        !grad.is_inference() && is_only_owner(grad) && grad.is_non_overlapping_and_dense()) {
      slot.sum = std::move(grad);
      slot.written = true;
      slot.adopted = true;
      slot.shared = false;
      continue;
    }
    const Destination destination = claim(indices[k]);
    const bool is_first = destination.beta == 0.0;
    (is_first ? first_sums : sums).push_back(destination.sum);
    (is_first ? first_grads : more_grads).push_back(std::move(grad));
  }
  accumulate(first_sums, first_grads, 0.0);
  accumulate(sums, more_grads, 1.0);
}

void AccumulationBuffers::begin() {
  for (Slot& slot : slots_) {
    slot.written_before = slot.written;
    slot.added_to = false;
  }
}

bool AccumulationBuffers::can_undo() const {
  return std::none_of(slots_.begin(), slots_.end(),
                      [](const Slot& slot) { return slot.written_before && slot.added_to; });
}

bool AccumulationBuffers::undo() {
  const bool intact = can_undo();
  for (Slot& slot : slots_) slot.written = slot.written_before;
  return intact;
}

void AccumulationBuffers::follow_params() {
  for (Slot& slot : slots_) {
    if (slot.written && !fits(slot)) convert(slot);
  }
}

void AccumulationBuffers::reset() {
  for (Slot& slot : slots_) {
    slot.written = false;
    slot.written_before = false;
    slot.added_to = false;
    if (slot.adopted) {
      slot.sum = at::Tensor();
      slot.adopted = false;
      slot.shared = false;
    }
  }
}

std::vector<std::size_t> AccumulationBuffers::written() const {
  std::vector<std::size_t> indices;
  indices.reserve(slots_.size());
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].written) indices.push_back(i);
  }
  return indices;
}

std::vector<at::Tensor> AccumulationBuffers::sums(const std::vector<std::size_t>& indices) const {
  std::vector<at::Tensor> result;
  result.reserve(indices.size());
  for (const std::size_t index : indices) result.push_back(slots_[index].sum);
  return result;
}

std::vector<at::Tensor> AccumulationBuffers::take(const std::vector<std::size_t>& indices) {
  std::vector<at::Tensor> result;
  result.reserve(indices.size());
  for (const std::size_t index : indices) {
    result.push_back(std::move(slots_[index].sum));
    slots_[index].sum = at::Tensor();
    slots_[index].written = false;
  }
  return result;
}

at::Tensor AccumulationBuffers::share(std::size_t index) {
  slots_[index].shared = true;
  return slots_[index].sum;
}

at::Tensor AccumulationBuffers::copy_of(std::size_t index, const at::Tensor& sum) const {
  const Slot& slot = slots_[index];
  return at::empty_like(slot.param, slot.param.options().dtype(dtype_of(slot))).copy_(sum);
}

void AccumulationBuffers::restore(std::size_t index, at::Tensor sum) {
  Slot& slot = slots_[index];
  slot.sum = std::move(sum);
  slot.written = true;
  slot.adopted = false;
  slot.shared = false;
}

}  // namespace torch_ext
