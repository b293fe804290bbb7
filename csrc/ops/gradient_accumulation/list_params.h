// Lists of tensors, already checked, as the kernels' params: the same for every device.
#pragma once

#include <cstdint>
#include <vector>

#include "../../kernels/accumulation_params.h"
#include "accumulation_arguments.h"
#include "list_loops.h"

namespace torch_ext {

/// Owns what its params point to.
template <typename Entry, typename Params>
class ListParams {
 public:
  ListParams(const ListParams&) = delete;
  ListParams& operator=(const ListParams&) = delete;

  Params params;
  std::int64_t elements = 0;  // of all entries

 protected:
  explicit ListParams(std::size_t size) : entries_(size) {
    params.entries = entries_.data();
    params.num_entries = static_cast<std::int64_t>(size);
  }

  LoopArena arena_;
  std::vector<Entry> entries_;
};

class AccumulateList : public ListParams<AccumulateEntry, AccumulateParams> {
 public:
  AccumulateList(at::TensorList accumulators, at::TensorList grads, double beta,
                 const at::Tensor* scale);
};

/// What is measured; where the results go is for the caller to fill in.
class GradStatsList : public ListParams<GradStatsEntry, GradStatsParams> {
 public:
  explicit GradStatsList(at::TensorList grads);
};

/// What an operator's call says beside its tensors.
struct StepSwitches {
  double lr = 0.0;
  ConstOperand device_lr{};
  bool maximize = false;
  bool reset = true;
};

class AdamList : public ListParams<AdamEntry, AdamParams> {
 public:
  AdamList(const AdamArguments& arguments, const StepSwitches& switches, bool decoupled);
};

class SgdList : public ListParams<SgdEntry, SgdParams> {
 public:
  /// `first_step` is empty, or says for each param whether its momentum buffer is written first.
  SgdList(const SgdArguments& arguments, const StepSwitches& switches,
          const c10::List<bool>& first_step);
};

}  // namespace torch_ext
