// Mini-batch training: micro-batches of any sizes, summed into one optimizer step.
//
//   torch_ext::GradientAccumulator accumulator(
//       model->parameters(), torch_ext::GradientAccumulatorOptions().max_norm(1.0));
//   for (auto& batch : micro_batches) {
//     auto scope = accumulator.micro_batch(/*weight=*/batch.tokens);
//     loss_sum(model, batch).backward();
//   }
//   at::Tensor norm = accumulator.step(optimizer);
//
// Wrong arguments throw c10::Error, naming the argument, what it takes and what it got.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace torch::optim {
class Optimizer;
}
namespace torch::serialize {
class InputArchive;
class OutputArchive;
}  // namespace torch::serialize

namespace torch_ext {

struct GradientAccumulatorOptions {
  /// Of the sums: kFloat, kDouble, kBFloat16 or kHalf. Gradients of kDouble parameters are summed
  /// in kDouble whatever it says.
  TORCH_ARG(at::ScalarType, dtype) = at::kFloat;
  /// > 0: clips the gradient's global norm. None: not clipped.
  TORCH_ARG(std::optional<double>, max_norm) = std::nullopt;
  /// Of the norm that is clipped and returned; infinity: the largest element.
  TORCH_ARG(double, norm_type) = 2.0;
  /// > 0: clips every element of the gradient, after its norm. None: not clipped.
  TORCH_ARG(std::optional<double>, clip_value) = std::nullopt;
  /// A gradient that is not finite throws and drops the window, instead of skipping the step.
  TORCH_ARG(bool, error_if_nonfinite) = false;
  /// Large gradients are added to the sums as backward produces them, so that no two layers' are in
  /// memory at once; .grad then stays undefined. With false .grad holds all of a micro-batch's
  /// gradients until it ends, to look at or to change.
  TORCH_ARG(bool, add_in_backward) = true;
};

class GradientAccumulator {
 public:
  class MicroBatch;

  /// The parameters of one model, on one device, each once.
  explicit GradientAccumulator(std::vector<at::Tensor> parameters,
                               GradientAccumulatorOptions options = {});
  /// Of several models that are trained together, on one device. What models share counts once.
  explicit GradientAccumulator(const std::vector<std::vector<at::Tensor>>& models,
                               GradientAccumulatorOptions options = {});
  ~GradientAccumulator();
  GradientAccumulator(GradientAccumulator&&) noexcept;
  GradientAccumulator& operator=(GradientAccumulator&&) noexcept;

  /// One micro-batch, as long as what it returns lives: call backward() on its summed loss.
  /// weight: what that loss is to be divided by in the end, its number of tokens or examples, >= 0.
  /// The step divides by the sum of all weights. What .grad held before it holds again afterwards.
  /// separate: nothing is added before it ends, as without add_in_backward, so that it can be
  /// discarded, or may fail, after its backward().
  [[nodiscard]] MicroBatch micro_batch(double weight = 1.0, bool separate = false);

  /// Normalises, clips and steps, and starts a new window. AdamW, Adam and SGD run fused in one
  /// pass; any other optimizer finds the gradient in .grad. A gradient that is not finite skips the
  /// step, its counters included, and starts a new window all the same. The optimizer has to hold
  /// these parameters and no others. Returns the global norm of the normalised gradient before
  /// clipping, without dimensions.
  at::Tensor step(torch::optim::Optimizer& optimizer);
  /// Several optimizers that share the parameters among them (one for matrices, one for the rest).
  at::Tensor step(const std::vector<torch::optim::Optimizer*>& optimizers);

  /// The norm that the following step() will return, for those who want it before. Between the two
  /// there may be no other micro-batch.
  at::Tensor prepare_step();

  /// Puts the gradient that step() will step with into .grad, normalised and clipped, to look at or
  /// to change: the step takes it from there. .grad keeps it afterwards, as in torch. Returns what
  /// prepare_step() returns.
  at::Tensor fill_grad();

  /// Whether the last step() found a gradient that is not finite, and left the optimizer alone.
  bool step_was_skipped() const;

  /// Drops what the window holds.
  void reset();

  /// How many the window holds so far.
  std::int64_t micro_batches() const;

  /// The batch size, in units of weight, beyond which larger ones help little: the simple noise
  /// scale of McCandlish et al. 2018 (appendix A.1), averaged over about 20 windows. NaN until a
  /// window of two micro-batches has been stepped.
  at::Tensor gradient_noise_scale() const;

  /// The window, half full or empty, and the float32 masters of bf16 and fp16 parameters. Together
  /// with model and optimizer it resumes bit by bit. torch::save(accumulator, path) works too.
  void save(torch::serialize::OutputArchive& archive) const;
  /// What save() wrote for the same parameters.
  void load(torch::serialize::InputArchive& archive);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Ends its micro-batch when it is destroyed. By an exception: then the micro-batch leaves no
/// trace, unless backward had begun to add to the sums of earlier ones, and reset() has to be
/// called.
class GradientAccumulator::MicroBatch {
 public:
  MicroBatch(const MicroBatch&) = delete;
  MicroBatch& operator=(const MicroBatch&) = delete;
  /// Throws where a gradient cannot be added (a sparse one), unless an exception is on its way.
  ~MicroBatch() noexcept(false);

  /// Leaves this micro-batch out: its gradients, its weight and that it was there. Before its
  /// backward(), or, of a separate one or with add_in_backward(false), at any time.
  void discard();

 private:
  friend class GradientAccumulator;
  MicroBatch(State& state, double weight);

  State& state_;
  double weight_;
  int exceptions_;
  bool discarded_ = false;
};

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                            const GradientAccumulator& accumulator);
torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                           GradientAccumulator& accumulator);

}  // namespace torch_ext
