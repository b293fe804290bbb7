#include "gradient_accumulator_masters.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>

#include "../tensor_storage.h"
#include "gradient_accumulator_buffers.h"

namespace torch_ext {
namespace {

constexpr const char* kWindow = "GradientAccumulator";

/// Makes `tensor` what `source` is, in the memory of `source`. Unlike set_data() it leaves
/// autograd's accumulation node, and whoever holds it, alone.
void become(const at::Tensor& tensor, const at::Tensor& source) {
  tensor.unsafeGetTensorImpl()->shallow_copy_from(source.getIntrusivePtr());
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
      entry.master = at::Tensor();  // the model has been widened
      masters.push_back(at::empty({0}, entry.param.options().dtype(at::kFloat)));
      continue;
    }
    const at::Tensor param = entry.param.detach();
    check_readable(kWindow, "a parameter", param);
    check_readable(kWindow, "a parameter's float32 master", entry.master);
    if (!entry.master.defined() || entry.master.device() != param.device() ||
        entry.master.sizes() != param.sizes()) {
      entry.master = param.to(at::kFloat);
    }
    if (entry.shared && !is_only_owner(entry.master)) entry.master = entry.master.clone();
    entry.shared = false;
    masters.push_back(entry.master);
  }
  return masters;
}

void MasterWeights::lend(const std::vector<std::size_t>& indices) {
  current(indices);
  for (const std::size_t index : indices) {
    Entry& entry = entries_[index];
    if (!has_master(entry.param)) continue;
    entry.lent = entry.param.detach();
    entry.master.copy_(at::where(entry.master.to(entry.lent.scalar_type()) == entry.lent,
                                 entry.master, entry.lent.to(at::kFloat)));
    become(entry.param, entry.master);
  }
}

void MasterWeights::take_back() {
  for (Entry& entry : entries_) {
    if (!entry.lent.defined()) continue;
    // Not always the master: an optimizer may have given the parameter other memory.
    const at::Tensor stepped = entry.param.detach();
    become(entry.param, entry.lent);
    entry.lent.copy_(stepped);
    entry.lent = at::Tensor();
    entry.master = stepped.scalar_type() == at::kFloat ? stepped : at::Tensor();
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
}

}  // namespace torch_ext
