// The state of a window as a flat dictionary of tensors, for Python's state_dict and for archives.
//
//   weight         float64, (2,)  what the sums are to be divided by: a number, and what tensors
//                                 have brought (NaN: none have)
//   micro_batches  int64, (1,)
//   first_weight   float64, (2,)  the first micro-batch's
//   first_square   float64, ()    the square of its norm; absent before the second
//   noise          float64, (2,)  absent before the first window
//   shape.NAME     int64, (dims,) of each parameter
//   sum.NAME       of each parameter that has a gradient in this window
//   master.NAME    float32, of each bf16 or fp16 parameter that has been stepped
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <string>
#include <unordered_set>
#include <utility>

#include "../tensor_storage.h"
#include "gradient_accumulator_core.h"

namespace torch_ext {
namespace {

constexpr const char* kLoad = "torch_ext::GradientAccumulator: load_state_dict() ";

/// One entry of a state that somebody has given: read only after it has been checked.
class Entry {
 public:
  Entry(const StateDict& state, std::string key)
      : key_(std::move(key)), tensor_(state.contains(key_) ? state.at(key_) : at::Tensor()) {}

  bool is_there() const { return tensor_.defined(); }
  const at::Tensor& tensor() const { return tensor_; }

  /// A dense tensor with memory.
  void check_dense() const {
    TORCH_CHECK(is_there(), kLoad, "takes what state_dict() gave, got one without '", key_, "'");
    TORCH_CHECK(!tensor_.is_nested(), kLoad, "'", key_, "' takes a dense tensor, got a nested one");
    TORCH_CHECK(tensor_.layout() == at::kStrided, kLoad, "'", key_,
                "' takes a dense tensor, got layout ", tensor_.layout());
    TORCH_CHECK(!tensor_.is_meta(), kLoad, "'", key_,
                "' takes a tensor with memory, got one on meta");
    TORCH_CHECK(has_readable_memory(tensor_), kLoad, "'", key_,
                "' takes a tensor with memory, got one whose storage was freed");
  }

  void check_floating() const {
    const at::ScalarType dtype = tensor_.scalar_type();
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
        kLoad, "'", key_, "' takes Float, Double, BFloat16 or Half, got ", dtype);
  }

  void check_sizes(at::IntArrayRef sizes) const {
    TORCH_CHECK(tensor_.sizes() == sizes, kLoad, "'", key_, "' takes sizes ", sizes, ", got ",
                tensor_.sizes());
  }

  /// Float64 numbers, as they are computed with on the host.
  std::vector<double> doubles(at::IntArrayRef sizes) const {
    check_dense();
    TORCH_CHECK(tensor_.scalar_type() == at::kDouble, kLoad, "'", key_, "' takes Double, got ",
                tensor_.scalar_type());
    check_sizes(sizes);
    const at::Tensor flat = tensor_.detach().to(at::kCPU).contiguous();
    const double* const data = flat.const_data_ptr<double>();
    return {data, data + flat.numel()};
  }

  std::vector<std::int64_t> integers() const {
    check_dense();
    TORCH_CHECK(tensor_.scalar_type() == at::kLong, kLoad, "'", key_, "' takes Long, got ",
                tensor_.scalar_type());
    TORCH_CHECK(tensor_.dim() <= 1, kLoad, "'", key_, "' takes at most one dimension, got sizes ",
                tensor_.sizes());
    const at::Tensor flat = tensor_.to(at::kCPU).contiguous();
    const std::int64_t* const data = flat.const_data_ptr<std::int64_t>();
    return {data, data + flat.numel()};
  }

  /// (number, what tensors have brought): see the head of this file.
  void check_weight() const {
    const std::vector<double> parts = doubles({2});
    const auto is_weight = [](double value) { return value >= 0.0 && std::isfinite(value); };
    TORCH_CHECK(is_weight(parts[0]) && (std::isnan(parts[1]) || is_weight(parts[1])), kLoad, "'",
                key_, "' takes finite weights >= 0, got ", parts[0], " and ", parts[1]);
  }

 private:
  std::string key_;
  at::Tensor tensor_;
};

std::int64_t checked_micro_batches(const StateDict& state) {
  const Entry entry(state, "micro_batches");
  const std::vector<std::int64_t> count = entry.integers();
  TORCH_CHECK(count.size() == 1, kLoad, "'micro_batches' takes one element, got sizes ",
              entry.tensor().sizes());
  TORCH_CHECK(count[0] >= 0, kLoad, "'micro_batches' takes a number >= 0, got ", count[0]);
  return count[0];
}

/// The square of a norm, which is not finite where a gradient was not.
void check_first_square(const StateDict& state, std::int64_t micro_batches) {
  const Entry entry(state, "first_square");
  if (entry.is_there()) {
    const double square = entry.doubles({})[0];
    TORCH_CHECK(!(square < 0.0), kLoad, "'first_square' takes a number >= 0, got ", square);
    TORCH_CHECK(micro_batches > 0, kLoad,
                "'first_square' takes a window with a micro-batch, got one without any");
  } else if (micro_batches > 1) {
    entry.check_dense();
  }
}

void check_noise(const StateDict& state) {
  const Entry entry(state, "noise");
  if (!entry.is_there()) return;
  const std::vector<double> means = entry.doubles({2});
  TORCH_CHECK(std::isfinite(means[0]) && std::isfinite(means[1]), kLoad,
              "'noise' takes finite numbers, got ", means[0], " and ", means[1]);
}

void check_known(const StateDict& state, const std::unordered_set<std::string>& known) {
  for (const auto& entry : state) {
    TORCH_CHECK(known.count(entry.key()) != 0, kLoad,
                "takes the state of the same model, got one with the unknown entry '", entry.key(),
                "'");
  }
}

}  // namespace

StateDict AccumulatorCore::state() {
  check_intact();
  TORCH_CHECK(!open_,
              "torch_ext::GradientAccumulator: state_dict() inside a micro_batch(): end it "
              "first");
  const at::NoGradGuard no_grad;
  StateDict state;
  state.insert("weight", weight_.state(device()));
  state.insert("micro_batches", at::tensor(micro_batches_, at::kLong));
  state.insert("first_weight", first_weight_.state(device()));
  // Copies: whoever holds the state may write or free them.
  if (first_square_.defined()) state.insert("first_square", first_square_.clone());
  if (noise_.state().defined()) state.insert("noise", noise_.state().clone());
  for (std::size_t i = 0; i < size(); ++i) {
    state.insert("shape." + names_[i], at::tensor(params_[i].sizes(), at::kLong));
    if (buffers_.is_written(i)) state.insert("sum." + names_[i], buffers_.share(i));
    const at::Tensor master = masters_.share(i);
    if (master.defined()) state.insert("master." + names_[i], master);
  }
  return state;
}

void AccumulatorCore::check_state(const StateDict& state) const {
  const std::int64_t micro_batches = checked_micro_batches(state);
  Entry(state, "weight").check_weight();
  Entry(state, "first_weight").check_weight();
  std::unordered_set<std::string> known{"micro_batches", "weight", "first_weight", "first_square",
                                        "noise"};
  for (std::size_t i = 0; i < size(); ++i) {
    const std::string& name = names_[i];
    const at::IntArrayRef param_sizes = params_[i].sizes();
    const Entry shape(state, "shape." + name);
    TORCH_CHECK(shape.is_there(), kLoad,
                "takes the state of the same model, got one without parameter ", name);
    const std::vector<std::int64_t> sizes = shape.integers();
    TORCH_CHECK(param_sizes == sizes, kLoad, "takes the state of the same model, where ", name,
                " has sizes ", param_sizes, ", got sizes ", at::IntArrayRef(sizes));
    for (const char* kind : {"sum.", "master."}) {
      const Entry entry(state, kind + name);
      if (!entry.is_there()) continue;
      entry.check_dense();
      entry.check_floating();
      entry.check_sizes(param_sizes);
    }
    TORCH_CHECK(micro_batches > 0 || !state.contains("sum." + name), kLoad, "'sum.", name,
                "' takes a window with a micro-batch, got one without any");
    for (const char* kind : {"shape.", "sum.", "master."}) known.insert(kind + name);
  }
  std::size_t in_state = 0;
  for (const auto& entry : state) {
    if (entry.key().rfind("shape.", 0) == 0) ++in_state;
  }
  TORCH_CHECK(in_state == size(), kLoad, "takes the state of the same model, with ", size(),
              " parameters, got one with ", in_state);
  check_known(state, known);
  check_first_square(state, micro_batches);
  check_noise(state);
}

void AccumulatorCore::load_state(const StateDict& state) {
  TORCH_CHECK(!open_,
              "torch_ext::GradientAccumulator: load_state_dict() inside a micro_batch(): "
              "end it first");
  check_state(state);
  const at::NoGradGuard no_grad;
  // Everything is copied before anything is changed: memory may run out.
  const auto copied = [&](const char* key) {
    return state.contains(key) ? state.at(key).detach().to(device(), at::kDouble,
                                                           /*non_blocking=*/false, /*copy=*/true)
                               : at::Tensor();
  };
  Weight weight = Weight::from_state(state.at("weight"), device());
  Weight first_weight = Weight::from_state(state.at("first_weight"), device());
  const std::int64_t micro_batches = state.at("micro_batches").item<std::int64_t>();
  at::Tensor first_square = copied("first_square");
  at::Tensor noise = copied("noise");
  std::vector<at::Tensor> sums(size());
  std::vector<at::Tensor> masters(size());
  for (std::size_t i = 0; i < size(); ++i) {
    const Entry sum(state, "sum." + names_[i]);
    if (sum.is_there()) sums[i] = buffers_.copy_of(i, sum.tensor());
    const Entry master(state, "master." + names_[i]);
    if (master.is_there()) masters[i] = masters_.copy_of(i, master.tensor());
  }
  reset();
  weight_ = std::move(weight);
  first_weight_ = std::move(first_weight);
  micro_batches_ = micro_batches;
  first_square_ = std::move(first_square);
  noise_.restore(std::move(noise));
  for (std::size_t i = 0; i < size(); ++i) {
    if (sums[i].defined()) buffers_.restore(i, std::move(sums[i]));
    masters_.restore(i, std::move(masters[i]));
  }
}

}  // namespace torch_ext
