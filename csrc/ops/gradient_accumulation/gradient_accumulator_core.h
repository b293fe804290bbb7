// What the C++ GradientAccumulator and its Python front share: one window of micro-batches, from
// the gradients in .grad to the coefficient that an optimizer operator takes.
#pragma once

#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "gradient_accumulator_autocast.h"
#include "gradient_accumulator_buffers.h"
#include "gradient_accumulator_masters.h"
#include "gradient_accumulator_noise.h"
#include "gradient_accumulator_take.h"

namespace torch_ext {

/// What the sum of losses is divided by: a number, a tensor of one element that is not read back
/// from its device, or both.
struct Weight {
  double number = 0.0;
  at::Tensor tensor{};  // float64, one element, or undefined

  void add(const Weight& other);
  at::Tensor value(const at::Device& device) const;  // float64, no dimensions
  /// (2,), float64: the number and the tensor, NaN where there is none.
  at::Tensor state(const at::Device& device) const;
  static Weight from_state(const at::Tensor& state, const at::Device& device);
};

/// Of the sums, before they are normalised.
struct SumStatistics {
  at::Tensor norm;
  at::Tensor found_inf;
};

/// What a step takes. All without dimensions, on the parameters' device.
struct StepScale {
  at::Tensor norm;         // of the normalised gradient, before clipping
  at::Tensor coefficient;  // times a sum: the gradient to step with
  at::Tensor found_inf;    // float32, not 0: the step is to be skipped
};

using StateDict = c10::Dict<std::string, at::Tensor>;

class AccumulatorCore final : public torch::CustomClassHolder {
 public:
  /// names are for messages and the state. takes_grads: micro-batches leave their gradients in the
  /// parameters' .grad (else add_to_open() brings them).
  AccumulatorCore(std::vector<at::Tensor> params, std::vector<std::string> names,
                  at::ScalarType dtype, bool takes_grads);

  std::size_t size() const { return params_.size(); }
  const at::Tensor& param(std::size_t index) const { return params_[index]; }
  const std::vector<at::Tensor>& params() const { return params_; }
  const std::string& name(std::size_t index) const { return names_[index]; }

  // --- A micro-batch: whatever .grad held is set aside while it is open.
  /// ticket: names this micro-batch for abort().
  void open(std::int64_t ticket = 0);
  void close(const Weight& weight);
  /// Takes the open micro-batch back.
  void abort();
  /// The same, of the micro-batch with this ticket; nothing where that is not open: to be called
  /// as often as an interrupted caller likes.
  void abort(std::int64_t ticket);
  bool is_open(std::int64_t ticket) const { return open_ && ticket_ == ticket; }
  /// Whether abort() would leave the earlier ones' sums whole.
  bool can_abort() const { return buffers_.can_undo(); }
  bool is_open() const { return open_; }
  /// A whole micro-batch whose gradients lie elsewhere.
  void add(const std::vector<std::size_t>& indices, std::vector<at::Tensor> grads,
           const Weight& weight);
  /// Gradients of the open micro-batch that lie elsewhere than in .grad.
  void add_to_open(const std::vector<std::size_t>& indices, std::vector<at::Tensor> grads);
  /// Adds the other's window, and empties it.
  void merge(AccumulatorCore& other);

  /// From the next micro-batch on large gradients leave .grad while backward is running.
  void add_in_backward(bool early) { adds_in_backward_ = early; }
  void take_grad(std::size_t index);
  const GradientTaker& taker() const { return taker_; }

  // --- Gradients that backward kernels add to the sums themselves, from autograd's threads.
  std::mutex& kernel_mutex() { return kernel_mutex_; }
  AccumulationBuffers::Destination claim(std::size_t index) { return buffers_.claim(index); }
  bool is_written(std::size_t index) const { return buffers_.is_written(index); }
  AutocastCopies& autocast_copies() { return autocast_copies_; }
  /// Hooks on autograd's accumulation nodes are somebody's who does without gradients (DDP's
  /// reducer while it does not synchronise).
  void ignore_node_hooks(bool ignore) { ignores_node_hooks_ = ignore; }
  bool ignores_node_hooks() const { return ignores_node_hooks_; }

  // --- The step.
  std::int64_t micro_batches() const { return micro_batches_; }
  at::Tensor weight() const { return weight_.value(device()); }
  /// (2,), float64: the squared norm of the first micro-batch's sum and its weight; NaN where there
  /// is one micro-batch only and measure_first() has not been called, or none.
  at::Tensor first_micro_batch() const;
  /// As if a second micro-batch were to follow: other processes have one.
  void measure_first() { before_more_gradients(); }
  std::vector<std::size_t> written() const { return buffers_.written(); }
  std::vector<at::Tensor> sums(const std::vector<std::size_t>& indices) const {
    return buffers_.sums(indices);
  }
  /// Multiplies sums in place, and gives them away: to those who read or write them until the
  /// window ends. The next window leaves what is still held then alone.
  std::vector<at::Tensor> scale_sums(const std::vector<std::size_t>& indices,
                                     const at::Tensor& coefficient);
  /// Refuses what these parameters' .grad cannot be added from: a sparse one, one that was freed.
  void check_grads(const std::vector<std::size_t>& indices) const;
  /// These parameters have no sum from here on.
  void forget(const std::vector<std::size_t>& indices);
  /// Sums of zeros for those that have none: other processes have gradients for them.
  void zero_missing(const std::vector<std::size_t>& indices);
  /// is_alone: there must be a micro-batch. Else other processes may have one.
  void check_steppable(bool is_alone);
  SumStatistics measure() const;
  /// normalised gradient = multiplier * inverse_scale * sum / weight.
  /// A window without gradients: nothing to step with.
  StepScale nothing() const;
  StepScale normalise(const SumStatistics& statistics, const at::Tensor& weight,
                      const at::Tensor& first_micro_batch, double multiplier,
                      const std::optional<at::Tensor>& inverse_scale,
                      std::optional<double> max_norm);
  void reset();
  /// Sums may have been written in part: nothing but reset() is possible from here on.
  void declare_lost() { damaged_ = true; }

  AccumulationBuffers& buffers() { return buffers_; }
  MasterWeights& masters() { return masters_; }
  const GradientNoise& noise() const { return noise_; }
  at::Device device() const;

  // --- A half-full window survives a restart.
  StateDict state();
  void load_state(const StateDict& state);

 private:
  void check_intact() const;
  void check_grad(std::size_t index, const at::Tensor& grad) const;
  /// The first micro-batch's norm has to be known before the second one is added to it.
  void before_more_gradients();
  /// Gradients of no open micro-batch: all of them, or the window is lost.
  void add_whole(const std::vector<std::size_t>& indices, std::vector<at::Tensor> grads);
  void count(const Weight& weight);
  void put_grads_back();
  void check_state(const StateDict& state) const;

  std::vector<at::Tensor> params_;
  std::vector<std::string> names_;
  bool takes_grads_;
  bool adds_in_backward_ = false;
  AccumulationBuffers buffers_;
  MasterWeights masters_;
  AutocastCopies autocast_copies_;
  GradientNoise noise_;
  GradientTaker taker_;
  std::mutex kernel_mutex_;

  bool open_ = false;
  std::int64_t ticket_ = 0;
  bool damaged_ = false;
  bool ignores_node_hooks_ = false;
  std::vector<at::Tensor> set_aside_;  // .grad as it was when the micro-batch was opened
  std::int64_t micro_batches_ = 0;
  Weight weight_;
  Weight first_weight_;
  at::Tensor first_square_;  // float64, of its norm; undefined until the second micro-batch
};

}  // namespace torch_ext
