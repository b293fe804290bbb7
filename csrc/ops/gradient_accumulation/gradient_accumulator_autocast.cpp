#include "gradient_accumulator_autocast.h"

#include <ATen/core/grad_mode.h>

namespace torch_ext {

at::Tensor AutocastCopies::copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype) return weight.detach();
  const std::lock_guard<std::mutex> lock(mutex_);
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
  for (Entry& entry : entries_) entry.copy = at::Tensor();
}

}  // namespace torch_ext
