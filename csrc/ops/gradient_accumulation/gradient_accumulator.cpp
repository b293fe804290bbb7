// The C++ front: micro-batches by scope, and archives.
#include <ATen/ops/ones_like.h>
#include <torch/csrc/api/include/torch/serialize/input-archive.h>
#include <torch/csrc/api/include/torch/serialize/output-archive.h>
#include <torch_ext/gradient_accumulator.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <unordered_set>
#include <utility>

#include "gradient_accumulator_clipping.h"
#include "gradient_accumulator_core.h"
#include "gradient_accumulator_optim.h"
#include "gradient_accumulator_visible.h"

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

std::vector<at::Tensor> each_once(const std::vector<std::vector<at::Tensor>>& models) {
  std::vector<at::Tensor> parameters;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const std::vector<at::Tensor>& model : models) {
    for (const at::Tensor& parameter : model) {
      if (seen.insert(parameter.unsafeGetTensorImpl()).second) parameters.push_back(parameter);
    }
  }
  return parameters;
}

void check_positive(const char* name, std::optional<double> value) {
  TORCH_CHECK(!value.has_value() || *value > 0.0, kOp, name, " takes a number > 0 or none, got ",
              value.value_or(0.0));
}

}  // namespace

struct GradientAccumulator::State {
  AccumulatorCore core;
  GradientAccumulatorOptions options;
  std::optional<StepScale> prepared{};
  bool shown = false;      // whether .grad holds the gradient of the step
  at::Tensor found_inf{};  // of the last step

  void reset() {
    core.reset();
    prepared.reset();
    shown = false;
  }
};

GradientAccumulator::GradientAccumulator(std::vector<at::Tensor> parameters,
                                         GradientAccumulatorOptions options) {
  check_positive("max_norm", options.max_norm());
  check_positive("clip_value", options.clip_value());
  TORCH_CHECK(!std::isnan(options.norm_type()), kOp, "norm_type takes a number, got nan");
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    TORCH_CHECK(!parameters[i].defined() || parameters[i].is_leaf(), kOp, "parameter ", i,
                " takes a leaf, got the result of an operation");
  }
  state_.reset(new State{
      AccumulatorCore(std::move(parameters), {}, options.dtype(), /*takes_grads=*/true), options});
}

GradientAccumulator::GradientAccumulator(const std::vector<std::vector<at::Tensor>>& models,
                                         GradientAccumulatorOptions options)
    : GradientAccumulator(each_once(models), std::move(options)) {}

GradientAccumulator::~GradientAccumulator() = default;
GradientAccumulator::GradientAccumulator(GradientAccumulator&&) noexcept = default;
GradientAccumulator& GradientAccumulator::operator=(GradientAccumulator&&) noexcept = default;

GradientAccumulator::MicroBatch GradientAccumulator::micro_batch(double weight, bool separate) {
  TORCH_CHECK(weight >= 0.0 && std::isfinite(weight), kOp,
              "weight takes a finite number >= 0, got ", weight);
  TORCH_CHECK(!state_->prepared.has_value(), kOp,
              "a micro-batch after prepare_step() or fill_grad(): call step() first");
  state_->core.add_in_backward(state_->options.add_in_backward() && !separate);
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
              "or goes with micro_batch(weight, /*separate=*/true)");
  discarded_ = true;
}

at::Tensor GradientAccumulator::prepare_step() {
  AccumulatorCore& core = state_->core;
  if (state_->prepared.has_value()) return state_->prepared->norm;
  core.check_steppable(/*is_alone=*/true);
  StepScale scale = clipped_scale(core, state_->options);
  if (state_->options.error_if_nonfinite() && !std::isfinite(scale.norm.item<double>())) {
    state_->reset();
    TORCH_CHECK(false, kOp, "the norm of order ", state_->options.norm_type(),
                " of the gradient is not finite, and error_if_nonfinite was asked for: the window "
                "is dropped");
  }
  state_->prepared = std::move(scale);
  return state_->prepared->norm;
}

at::Tensor GradientAccumulator::fill_grad() {
  at::Tensor norm = prepare_step();
  if (state_->shown) return norm;
  try {
    StepScale& scale = *state_->prepared;
    show_gradients(state_->core, clip_values(state_->core, state_->options, scale.coefficient));
    scale.coefficient = at::ones_like(scale.coefficient);
    state_->shown = true;
  } catch (...) {
    state_->reset();
    throw;
  }
  return norm;
}

at::Tensor GradientAccumulator::step(torch::optim::Optimizer& optimizer) {
  return step({&optimizer});
}

at::Tensor GradientAccumulator::step(const std::vector<torch::optim::Optimizer*>& optimizers) {
  AccumulatorCore& core = state_->core;
  check_optimizers(optimizers, core);
  at::Tensor norm = prepare_step();
  StepScale scale = *state_->prepared;
  if (state_->shown) {
    take_gradients_back(core);
    scale.found_inf = core.measure().found_inf;
  }
  state_->found_inf = scale.found_inf;
  try {
    if (!state_->shown) {
      scale.coefficient = clip_values(core, state_->options, scale.coefficient);
    }
    step_optimizers(optimizers, core, scale);
  } catch (...) {
    state_->reset();
    throw;
  }
  state_->reset();
  return norm;
}

bool GradientAccumulator::step_was_skipped() const {
  return state_->found_inf.defined() && state_->found_inf.item<float>() != 0.0f;
}

void GradientAccumulator::reset() { state_->reset(); }

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
  state_->prepared.reset();
  state_->shown = false;
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
