#include "gradient_accumulator_masters.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>

#include "gradient_accumulator_buffers.h"

namespace torch_ext {
namespace {

std::uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0
                               : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

}  // namespace

MasterWeights::MasterWeights(std::vector<at::Tensor> params) {
  entries_.reserve(params.size());
  for (at::Tensor& param : params) entries_.push_back({.param = std::move(param)});
}

bool MasterWeights::has_master(const at::Tensor& param) {
  return param.scalar_type() == at::kBFloat16 || param.scalar_type() == at::kHalf;
}

std::vector<at::Tensor> MasterWeights::current(const std::vector<std::size_t>& indices) {
  std::vector<at::Tensor> masters;
  masters.reserve(indices.size());
  for (const std::size_t index : indices) {
    Entry& entry = entries_[index];
    if (!has_master(entry.param)) {
      masters.push_back(at::empty({0}, entry.param.options().dtype(at::kFloat)));
      continue;
    }
    const at::Tensor param = entry.param.detach();
    if (!entry.master.defined() || entry.master.device() != param.device()) {
      entry.master = param.to(at::kFloat);
    } else if (entry.version != version_of(entry.param)) {
      entry.master = at::where(entry.master.to(param.scalar_type()) == param, entry.master,
                               param.to(at::kFloat));
    }
    if (entry.shared && !is_only_owner(entry.master)) entry.master = entry.master.clone();
    entry.shared = false;
    entry.version = version_of(entry.param);
    masters.push_back(entry.master);
  }
  return masters;
}

void MasterWeights::mark_stepped(const std::vector<std::size_t>& indices) {
  for (const std::size_t index : indices) {
    entries_[index].version = version_of(entries_[index].param);
  }
}

at::Tensor MasterWeights::share(std::size_t index) {
  entries_[index].shared = true;
  return entries_[index].master;
}

at::Tensor MasterWeights::copy_of(std::size_t index, const at::Tensor& master) const {
  const at::Tensor& param = entries_[index].param;
  // Of a model that was narrower when its state was saved.
  if (!has_master(param)) return {};
  return at::empty_like(param, param.options().dtype(at::kFloat)).copy_(master);
}

void MasterWeights::restore(std::size_t index, at::Tensor master) {
  Entry& entry = entries_[index];
  entry.master = std::move(master);
  entry.shared = false;
  // Compared with the parameter before it is used: that may be loaded before or after.
  entry.version = version_of(entry.param) - 1;
}

}  // namespace torch_ext
