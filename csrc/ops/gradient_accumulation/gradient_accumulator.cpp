// The C++ front: micro-batches by scope, and archives.
#include <torch/csrc/api/include/torch/serialize/input-archive.h>
#include <torch/csrc/api/include/torch/serialize/output-archive.h>
#include <torch_ext/gradient_accumulator.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <utility>

#include "gradient_accumulator_core.h"
#include "gradient_accumulator_optim.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "torch_ext::GradientAccumulator: ";

/// Archives' names are identifiers, and these are lists of parameters without names: "sum.0".
std::string archive_key(std::string key) {
  std::replace(key.begin(), key.end(), '.', '_');
  return key;
}

std::vector<std::string> possible_keys(std::size_t count) {
  std::vector<std::string> keys{"weight", "micro_batches", "first_weight", "first_square", "noise"};
  for (std::size_t i = 0; i < count; ++i) {
    for (const char* kind : {"shape.", "sum.", "master."}) keys.push_back(kind + std::to_string(i));
  }
  return keys;
}

}  // namespace

struct GradientAccumulator::State {
  AccumulatorCore core;
  GradientAccumulatorOptions options;
  at::Tensor found_inf{};  // of the last step
};

GradientAccumulator::GradientAccumulator(std::vector<at::Tensor> parameters,
                                         GradientAccumulatorOptions options) {
  const std::optional<double> max_norm = options.max_norm();
  TORCH_CHECK(!max_norm.has_value() || *max_norm > 0.0, kOp,
              "max_norm takes a number > 0 or none, got ", max_norm.value_or(0.0));
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK(!parameters[i].defined() || parameters[i].is_leaf(), kOp, "parameter ", i,
                " takes a leaf, got the result of an operation");
  }
  state_.reset(
      new State{AccumulatorCore(std::move(parameters), {}, options.dtype(), /*takes_grads=*/true),
                options, at::Tensor()});
  state_->core.add_in_backward(options.add_in_backward());
}

GradientAccumulator::~GradientAccumulator() = default;
GradientAccumulator::GradientAccumulator(GradientAccumulator&&) noexcept = default;
GradientAccumulator& GradientAccumulator::operator=(GradientAccumulator&&) noexcept = default;

GradientAccumulator::MicroBatch GradientAccumulator::micro_batch(double weight) {
  TORCH_CHECK(weight >= 0.0 && std::isfinite(weight), kOp,
              "weight takes a finite number >= 0, got ", weight);
  return {*state_, weight};
}

GradientAccumulator::MicroBatch::MicroBatch(State& state, double weight)
    : state_(state), weight_(weight), exceptions_(std::uncaught_exceptions()) {
  state_.core.open();
}

GradientAccumulator::MicroBatch::~MicroBatch() noexcept(false) {
  if (discarded_ || std::uncaught_exceptions() > exceptions_) {
    state_.core.abort();
  } else {
    state_.core.close({weight_, at::Tensor()});
  }
}

void GradientAccumulator::MicroBatch::discard() {
  TORCH_CHECK(state_.core.can_abort(), kOp,
              "discard() comes before backward(), which adds to the sums of earlier micro-batches, "
              "or goes with add_in_backward(false)");
  discarded_ = true;
}

at::Tensor GradientAccumulator::step(torch::optim::Optimizer& optimizer) {
  AccumulatorCore& core = state_->core;
  check_optimizer(optimizer, core);
  core.check_steppable(/*is_alone=*/true);
  if (core.written().empty()) {  // the no-op that torch's optimizers make of it
    core.reset();
    state_->found_inf = core.nothing().found_inf;
    return core.nothing().norm;
  }
  const StepScale scale =
      core.normalise(core.measure(), core.weight(), core.first_micro_batch(), /*multiplier=*/1.0,
                     /*inverse_scale=*/std::nullopt, state_->options.max_norm());
  state_->found_inf = scale.found_inf;
  try {
    step_optimizer(optimizer, core, scale);
  } catch (...) {
    core.reset();
    throw;
  }
  core.reset();
  return scale.norm;
}

bool GradientAccumulator::step_was_skipped() const {
  return state_->found_inf.defined() && state_->found_inf.item<float>() != 0.0f;
}

void GradientAccumulator::reset() { state_->core.reset(); }

std::int64_t GradientAccumulator::micro_batches() const { return state_->core.micro_batches(); }

at::Tensor GradientAccumulator::gradient_noise_scale() const {
  return state_->core.noise().scale();
}

void GradientAccumulator::save(torch::serialize::OutputArchive& archive) const {
  for (const auto& entry : state_->core.state()) {
    archive.write(archive_key(entry.key()), entry.value(), /*is_buffer=*/true);
  }
}

void GradientAccumulator::load(torch::serialize::InputArchive& archive) {
  StateDict read;
  for (const std::string& key : possible_keys(state_->core.size())) {
    at::Tensor value;
    if (archive.try_read(archive_key(key), value, /*is_buffer=*/true)) read.insert(key, value);
  }
  // One parameter more than these would go unnoticed.
  const std::string next = std::to_string(state_->core.size());
  at::Tensor more;
  TORCH_CHECK(!archive.try_read("shape_" + next, more, /*is_buffer=*/true), kOp,
              "load() takes the state of the same model, with ", next,
              " parameters, got one with more");
  state_->core.load_state(read);
}

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                            const GradientAccumulator& accumulator) {
  accumulator.save(archive);
  return archive;
}

torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                           GradientAccumulator& accumulator) {
  accumulator.load(archive);
  return archive;
}

}  // namespace torch_ext
