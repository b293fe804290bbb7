#include "gradient_accumulator_core.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <limits>
#include <unordered_set>
#include <utility>

#include "../tensor_storage.h"
#include "gradient_accumulator_calls.h"

namespace torch_ext {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr const char* kOp = "torch_ext::GradientAccumulator: ";

void check_param(const at::Tensor& param, const std::string& name) {
  TORCH_CHECK(param.defined(), kOp, "parameter ", name, " takes a tensor, got none");
  TORCH_CHECK(!param.is_nested(), kOp, "parameter ", name,
              " takes a dense tensor; nested tensors are not supported");
  TORCH_CHECK(param.layout() == at::kStrided, kOp, "parameter ", name,
              " takes a dense tensor; sparse tensors are not supported, got layout ",
              param.layout());
  TORCH_CHECK(!param.is_complex(), kOp, "parameter ", name,
              " takes a real tensor; complex tensors are not supported, got ", param.scalar_type());
  switch (param.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return;
    default:
      // A frozen table of integers (quantized weights) takes no part.
      TORCH_CHECK(!param.requires_grad(), kOp, "parameter ", name,
                  " takes Float, Double, BFloat16 or Half, got ", param.scalar_type());
  }
}

std::vector<std::string> checked_names(const std::vector<at::Tensor>& params,
                                       std::vector<std::string> names) {
  if (names.empty()) {
    for (std::size_t i = 0; i < params.size(); ++i) names.push_back(std::to_string(i));
  }
  TORCH_CHECK(names.size() == params.size(), kOp, "takes one name for each parameter, ",
              params.size(), ", got ", names.size());
  std::unordered_set<const c10::TensorImpl*> seen;
  for (std::size_t i = 0; i < params.size(); ++i) {
    check_param(params[i], names[i]);
    TORCH_CHECK(seen.insert(params[i].unsafeGetTensorImpl()).second, kOp, "parameter ", names[i],
                " is named twice");
    TORCH_CHECK(params[i].device() == params[0].device(), kOp, "parameter ", names[i],
                " takes a tensor on ", params[0].device(), " like the others, got one on ",
                params[i].device());
  }
  TORCH_CHECK(!params.empty(), kOp, "takes at least one parameter, got none");
  return names;
}

at::ScalarType checked_dtype(at::ScalarType dtype) {
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      kOp, "dtype takes Float, Double, BFloat16 or Half, got ", dtype);
  return dtype;
}

}  // namespace

void Weight::add(const Weight& other) {
  number += other.number;
  if (!other.tensor.defined()) return;
  tensor = tensor.defined() ? tensor + other.tensor : other.tensor;
}

at::Tensor Weight::value(const at::Device& device) const {
  if (tensor.defined()) return tensor + number;
  return at::full({}, number, at::TensorOptions(at::kDouble).device(device));
}

at::Tensor Weight::state(const at::Device& device) const {
  const at::Tensor none = at::full({}, kNan, at::TensorOptions(at::kDouble).device(device));
  return at::stack({at::full_like(none, number), tensor.defined() ? tensor : none});
}

Weight Weight::from_state(const at::Tensor& state, const at::Device& device) {
  const at::Tensor parts = state.to(at::kCPU, at::kDouble);
  Weight weight{parts.select(0, 0).item<double>(), at::Tensor()};
  const double in_tensor = parts.select(0, 1).item<double>();
  if (!std::isnan(in_tensor)) {
    weight.tensor = at::full({}, in_tensor, at::TensorOptions(at::kDouble).device(device));
  }
  return weight;
}

AccumulatorCore::AccumulatorCore(std::vector<at::Tensor> params, std::vector<std::string> names,
                                 at::ScalarType dtype, bool takes_grads)
    : params_(std::move(params)),
      names_(checked_names(params_, std::move(names))),
      takes_grads_(takes_grads),
      buffers_(params_, checked_dtype(dtype)),
      masters_(params_),
      autocast_copies_(params_.size()),
      taker_(*this) {}

at::Device AccumulatorCore::device() const { return params_[0].device(); }

void AccumulatorCore::check_intact() const {
  TORCH_CHECK(!damaged_, kOp,
              "a micro-batch failed after its backward had begun to add to the sums of earlier "
              "ones, or the window was interrupted while its sums were written: call reset() and "
              "start the window again");
}

void AccumulatorCore::check_grad(std::size_t index, const at::Tensor& grad) const {
  const std::string& name = names_[index];
  TORCH_CHECK(!grad.is_nested(), kOp, "the gradient of ", name,
              " takes a dense tensor; nested tensors are not supported");
  TORCH_CHECK(grad.layout() == at::kStrided, kOp, "the gradient of ", name,
              " takes a dense tensor; sparse tensors are not supported, got layout ",
              grad.layout());
  TORCH_CHECK(grad.sizes() == params_[index].sizes(), kOp, "the gradient of ", name,
              " takes the sizes ", params_[index].sizes(), ", got ", grad.sizes());
  TORCH_CHECK(grad.device() == params_[index].device(), kOp, "the gradient of ", name,
              " takes a tensor on ", params_[index].device(), ", got one on ", grad.device());
  TORCH_CHECK(at::isFloatingType(grad.scalar_type()), kOp, "the gradient of ", name,
              " takes a floating tensor, got ", grad.scalar_type());
  TORCH_CHECK(has_readable_memory(grad), kOp, "the gradient of ", name,
              " takes a tensor with memory, got one whose storage was freed");
}

void AccumulatorCore::open(std::int64_t ticket) {
  check_intact();
  TORCH_CHECK(!open_, kOp, "micro_batch() inside a micro_batch(): end that one first");
  buffers_.follow_params();
  before_more_gradients();
  buffers_.begin();
  if (takes_grads_) {
    if (adds_in_backward_) taker_.attach();
    set_aside_.resize(params_.size());
    for (std::size_t i = 0; i < params_.size(); ++i) {
      at::Tensor& grad = params_[i].mutable_grad();
      if (grad.defined()) set_aside_[i] = std::move(grad);
      grad = at::Tensor();
    }
  }
  open_ = true;
  ticket_ = ticket;
}

void AccumulatorCore::put_grads_back() {
  if (!takes_grads_) return;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    params_[i].mutable_grad() = std::move(set_aside_[i]);
    set_aside_[i] = at::Tensor();
  }
}

void AccumulatorCore::take_grad(std::size_t index) {
  // Not the gradients of a pass that builds a graph of them.
  if (!open_ || !adds_in_backward_ || at::GradMode::is_enabled()) return;
  at::Tensor& grad = params_[index].mutable_grad();
  if (!grad.defined() || grad.layout() != at::kStrided) return;
  const std::lock_guard<std::mutex> lock(kernel_mutex_);
  std::vector<at::Tensor> taken;
  taken.push_back(std::move(grad));
  grad = at::Tensor();
  buffers_.add({index}, std::move(taken));
}

void AccumulatorCore::close(const Weight& weight) {
  TORCH_CHECK(open_, kOp, "no micro_batch() is open");
  const at::NoGradGuard no_grad;
  std::vector<std::size_t> indices;
  std::vector<at::Tensor> grads;
  if (takes_grads_) {
    for (std::size_t i = 0; i < params_.size(); ++i) {
      at::Tensor& grad = params_[i].mutable_grad();
      if (!grad.defined()) continue;
      indices.push_back(i);
      grads.push_back(std::move(grad));
      grad = at::Tensor();
    }
  }
  try {
    add_to_open(indices, std::move(grads));
    count(weight);
  } catch (...) {
    abort();
    throw;
  }
  put_grads_back();
  open_ = false;
}

void AccumulatorCore::abort() {
  if (!open_) return;
  damaged_ = !buffers_.undo() || damaged_;
  put_grads_back();
  open_ = false;
}

void AccumulatorCore::abort(std::int64_t ticket) {
  if (is_open(ticket)) abort();
}

void AccumulatorCore::add_to_open(const std::vector<std::size_t>& indices,
                                  std::vector<at::Tensor> grads) {
  TORCH_CHECK(open_, kOp, "no micro_batch() is open");
  const at::NoGradGuard no_grad;
  for (std::size_t k = 0; k < indices.size(); ++k) check_grad(indices[k], grads[k]);
  buffers_.add(indices, std::move(grads));
}

void AccumulatorCore::add(const std::vector<std::size_t>& indices, std::vector<at::Tensor> grads,
                          const Weight& weight) {
  check_intact();
  TORCH_CHECK(!open_, kOp, "a micro_batch() is open: end it first");
  const at::NoGradGuard no_grad;
  for (std::size_t k = 0; k < indices.size(); ++k) check_grad(indices[k], grads[k]);
  before_more_gradients();
  add_whole(indices, std::move(grads));
  count(weight);
}

void AccumulatorCore::add_whole(const std::vector<std::size_t>& indices,
                                std::vector<at::Tensor> grads) {
  try {
    buffers_.add(indices, std::move(grads));
  } catch (...) {
    declare_lost();
    throw;
  }
}

void AccumulatorCore::before_more_gradients() {
  if (micro_batches_ != 1 || first_square_.defined()) return;
  const at::NoGradGuard no_grad;
  first_square_ = measure().norm.to(at::kDouble).square();
}

void AccumulatorCore::count(const Weight& weight) {
  if (micro_batches_ == 0) first_weight_ = weight;
  weight_.add(weight);
  ++micro_batches_;
}

void AccumulatorCore::merge(AccumulatorCore& other) {
  check_intact();
  other.check_intact();
  TORCH_CHECK(&other != this, kOp, "merge() takes another window, got itself");
  TORCH_CHECK(other.size() == size(), kOp, "merge() takes a window of the same parameters, ",
              size(), ", got one of ", other.size());
  for (std::size_t i = 0; i < size(); ++i) {
    TORCH_CHECK(other.params_[i].is_same(params_[i]), kOp,
                "merge() takes a window of the same parameters, got another one for ", names_[i]);
  }
  TORCH_CHECK(!open_ && !other.open_, kOp, "a micro_batch() is open: end it first");
  if (other.micro_batches_ == 0) return;
  const at::NoGradGuard no_grad;
  if (micro_batches_ == 0) {
    first_weight_ = other.first_weight_;
    first_square_ = other.first_square_;
  } else {
    before_more_gradients();
  }
  const std::vector<std::size_t> indices = other.buffers_.written();
  std::vector<at::Tensor> sums = other.buffers_.take(indices);
  add_whole(indices, std::move(sums));
  weight_.add(other.weight_);
  micro_batches_ += other.micro_batches_;
  other.reset();
}

at::Tensor AccumulatorCore::first_micro_batch() const {
  const auto options = at::TensorOptions(at::kDouble).device(device());
  if (!first_square_.defined()) {
    return at::full({2}, kNan, options);
  }
  return at::stack({first_square_, first_weight_.value(device())});
}

std::vector<at::Tensor> AccumulatorCore::scale_sums(const std::vector<std::size_t>& indices,
                                                    const at::Tensor& coefficient) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> sums;
  sums.reserve(indices.size());
  for (const std::size_t index : indices) {
    buffers_.claim(index);  // a copy, where somebody holds the sum
    sums.push_back(buffers_.share(index));
  }
  if (!sums.empty()) at::_foreach_mul_(sums, coefficient);
  return sums;
}

void AccumulatorCore::check_grads(const std::vector<std::size_t>& indices) const {
  for (const std::size_t index : indices) check_grad(index, params_[index].grad());
}

void AccumulatorCore::forget(const std::vector<std::size_t>& indices) { buffers_.take(indices); }

void AccumulatorCore::zero_missing(const std::vector<std::size_t>& indices) {
  const at::NoGradGuard no_grad;
  for (const std::size_t index : indices) {
    if (!buffers_.is_written(index)) buffers_.claim(index).sum.zero_();
  }
}

void AccumulatorCore::reset() {
  if (open_) abort();
  buffers_.reset();
  autocast_copies_.clear();
  damaged_ = false;
  micro_batches_ = 0;
  weight_ = Weight{};
  first_weight_ = Weight{};
  first_square_ = at::Tensor();
}

}  // namespace torch_ext
