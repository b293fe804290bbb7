// The state of a window as a flat dictionary of tensors, for Python's state_dict and for archives.
//
//   weight         float64, (2,)  what the sums are to be divided by: a number, and what tensors
//                                 have brought (NaN: none have)
//   micro_batches  int64, ()
//   first_weight   float64, (2,)  the first micro-batch's
//   first_square   float64, ()    the square of its norm; absent before the second
//   noise          float64, (2,)  absent before the first window
//   shape.NAME     int64, (dims,) of each parameter
//   sum.NAME       of each parameter that has a gradient in this window
//   master.NAME    float32, of each bf16 or fp16 parameter that has been stepped
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <string>

#include "gradient_accumulator_core.h"

namespace torch_ext {
namespace {

std::vector<std::int64_t> numbers(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kCPU, at::kLong).contiguous();
  const std::int64_t* const data = flat.const_data_ptr<std::int64_t>();
  return {data, data + flat.numel()};
}

const char* const kKeys[] = {"weight", "micro_batches", "first_weight"};

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
  if (first_square_.defined()) state.insert("first_square", first_square_);
  if (noise_.state().defined()) state.insert("noise", noise_.state());
  for (std::size_t i = 0; i < size(); ++i) {
    state.insert("shape." + names_[i], at::tensor(params_[i].sizes(), at::kLong));
    if (buffers_.is_written(i)) state.insert("sum." + names_[i], buffers_.share(i));
    const at::Tensor master = masters_.share(i);
    if (master.defined()) state.insert("master." + names_[i], master);
  }
  return state;
}

void AccumulatorCore::check_state(const StateDict& state) const {
  constexpr const char* kOp = "torch_ext::GradientAccumulator: load_state_dict() ";
  for (const char* key : kKeys) {
    TORCH_CHECK(state.contains(key), kOp, "takes what state_dict() gave, got one without '", key,
                "'");
  }
  for (std::size_t i = 0; i < size(); ++i) {
    const std::string& name = names_[i];
    TORCH_CHECK(state.contains("shape." + name), kOp,
                "takes the state of the same model, got one without parameter ", name);
    const std::vector<std::int64_t> sizes = numbers(state.at("shape." + name));
    TORCH_CHECK(params_[i].sizes() == sizes, kOp, "takes the state of the same model, where ", name,
                " has sizes ", params_[i].sizes(), ", got sizes ", at::IntArrayRef(sizes));
    for (const char* kind : {"sum.", "master."}) {
      if (!state.contains(kind + name)) continue;
      TORCH_CHECK(state.at(kind + name).sizes() == params_[i].sizes(), kOp, "'", kind, name,
                  "' takes sizes ", params_[i].sizes(), ", got ", state.at(kind + name).sizes());
    }
  }
  std::size_t in_state = 0;
  for (const auto& entry : state) {
    if (entry.key().rfind("shape.", 0) != 0) continue;
    ++in_state;
  }
  TORCH_CHECK(in_state == size(), kOp, "takes the state of the same model, with ", size(),
              " parameters, got one with ", in_state);
}

void AccumulatorCore::load_state(const StateDict& state) {
  check_state(state);
  TORCH_CHECK(!open_,
              "torch_ext::GradientAccumulator: load_state_dict() inside a micro_batch(): "
              "end it first");
  const at::NoGradGuard no_grad;
  reset();
  const auto copied = [&](const char* key) {
    return state.contains(key) ? state.at(key).detach().to(device(), at::kDouble,
                                                           /*non_blocking=*/false, /*copy=*/true)
                               : at::Tensor();
  };
  weight_ = Weight::from_state(state.at("weight"), device());
  micro_batches_ = state.at("micro_batches").item<std::int64_t>();
  first_weight_ = Weight::from_state(state.at("first_weight"), device());
  first_square_ = copied("first_square");
  noise_.restore(copied("noise"));
  for (std::size_t i = 0; i < size(); ++i) {
    if (state.contains("sum." + names_[i])) buffers_.restore(i, state.at("sum." + names_[i]));
    const std::string master = "master." + names_[i];
    masters_.restore(i, state.contains(master) ? state.at(master) : at::Tensor());
  }
}

}  // namespace torch_ext
