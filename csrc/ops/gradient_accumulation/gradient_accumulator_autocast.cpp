#include "gradient_accumulator_autocast.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "../tensor_storage.h"

namespace torch_ext {

bool AutocastCopies::is_new_region(const at::Device& device, at::ScalarType dtype) {
  // torch tells regions apart by its cache alone, which it empties at the end of each.
  if (!probe_.defined() || probe_.device() != device) {
    probe_ = at::zeros({1}, at::TensorOptions(at::kFloat).device(device)).set_requires_grad(true);
  }
  at::Tensor copy = at::autocast::cached_cast(dtype, probe_, device.type());
  if (copy.is_same(probe_copy_)) return false;
  probe_copy_ = std::move(copy);
  return true;
}

at::Tensor AutocastCopies::copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype) return weight.detach();
  check_readable("GradientAccumulator", "the weight of a layer under autocast", weight);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_new_region(weight.device(), dtype)) forget_copies();
  Entry& entry = entries_[index];
  const std::uint32_t version = weight.unsafeGetTensorImpl()->version_counter().current_version();
  if (!entry.copy.defined() || entry.version != version || entry.copy.scalar_type() != dtype ||
      entry.copy.device() != weight.device()) {
    const at::NoGradGuard no_grad;
    entry = {weight.detach().to(dtype), version};
  }
  return entry.copy;
}

void AutocastCopies::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  forget_copies();
}

void AutocastCopies::forget_copies() {
  for (Entry& entry : entries_) entry.copy = at::Tensor();
}

}  // namespace torch_ext
