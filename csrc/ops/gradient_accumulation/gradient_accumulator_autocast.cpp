#include "gradient_accumulator_autocast.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <utility>

#include "../../kernels/bf16_copy.h"
#include "../tensor_storage.h"

namespace torch_ext {
namespace {

// Elements: 6 bytes are read of each, and a thread is worth its start from some 100 KB on.
constexpr std::int64_t kGrain = 1 << 15;

/// Whether the copy still is the weight, rounded. It reads 6 bytes an element and writes none; to
/// cast again writes 2 more, into memory that is to be fetched first. Other dtypes and devices say
/// no: float16 would need its own rounding, and a device would have to be waited for.
bool is_current_copy(const at::Tensor& copy, const at::Tensor& weight) {
  if (!weight.device().is_cpu() || weight.scalar_type() != at::kFloat ||
      copy.scalar_type() != at::kBFloat16 || copy.sizes() != weight.sizes() ||
      copy.strides() != weight.strides() || !weight.is_non_overlapping_and_dense()) {
    return false;
  }
  const float* const values = weight.const_data_ptr<float>();
  const auto* const rounded = reinterpret_cast<const std::uint16_t*>(copy.const_data_ptr());
  std::atomic<bool> same{true};
  at::parallel_for(0, weight.numel(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    if (!is_bf16_copy(values + begin, rounded + begin, end - begin)) same = false;
  });
  return same;
}

}  // namespace

std::uint64_t AutocastCopies::current_region(const at::Device& device, at::ScalarType dtype) {
  // torch tells regions apart by its cache alone, which it empties at the end of each.
  if (!probe_.defined() || probe_.device() != device) {
    probe_ = at::zeros({1}, at::TensorOptions(at::kFloat).device(device)).set_requires_grad(true);
  }
  at::Tensor copy = at::autocast::cached_cast(dtype, probe_, device.type());
  if (!copy.is_same(probe_copy_)) {
    probe_copy_ = std::move(copy);
    ++region_;
  }
  return region_;
}

at::Tensor AutocastCopies::copy(std::size_t index, const at::Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype) return weight.detach();
  check_readable("GradientAccumulator", "the weight of a layer under autocast", weight);
  const std::uint32_t version = weight.unsafeGetTensorImpl()->version_counter().current_version();
  Entry entry;
  std::uint64_t region = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    region = current_region(weight.device(), dtype);
    entry = entries_[index];
  }
  const bool fits = entry.copy.defined() && entry.version == version &&
                    entry.copy.scalar_type() == dtype && entry.copy.device() == weight.device();
  if (fits && entry.region == region) return entry.copy;
  // Several workers may do this at once: each finds the same.
  if (!fits || !is_current_copy(entry.copy, weight.detach())) {
    const at::NoGradGuard no_grad;
    entry.copy = weight.detach().to(dtype);
  }
  entry.version = version;
  entry.region = region;
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_[index] = entry;
  return entry.copy;
}

void AutocastCopies::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) entry.copy = at::Tensor();
}

}  // namespace torch_ext
