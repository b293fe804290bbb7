// vmap over packed sequences: the mapped dimension becomes more heads, (total, mapped * heads,
// head_dim). Where samples have lengths of their own, or share the dropout of one seed, they are
// computed one by one.
#include <torch/library.h>

#include "../attention/stacked_samples.h"
#include "../attention/vmap_level.h"
#include "varlen_operators.h"
#include "varlen_signature.h"

namespace torch_ext {
namespace {

class Samples {
 public:
  Samples(const char* op, const VarlenArguments& arguments, const VarlenGradients* gradients)
      : arguments_(arguments),
        gradients_(gradients),
        level_(op, all_tensors(arguments, gradients)) {}

  /// Whether the samples differ in nothing but what heads may differ in.
  bool are_heads() const {
    // Scales are of kv_heads or of all: samples would need as many as heads.
    if (given(arguments_.block_table) != nullptr) return false;
    const bool lengths = level_.is_mapped(arguments_.cu_seq_q) || is_mapped(arguments_.cu_seq_k) ||
                         is_mapped(arguments_.block_table) || is_mapped(arguments_.leftpad_k) ||
                         is_mapped(arguments_.seqused_k);
    const bool shares_dropout = arguments_.dropout_p > 0.0 && !is_mapped(arguments_.dropout_seed);
    return !lengths && !shares_dropout;
  }

  std::int64_t count() const { return level_.batch_size().guard_int(__FILE__, __LINE__); }

  VarlenArguments sample(std::int64_t index) const {
    VarlenArguments result = arguments_;
    for (at::Tensor* tensor : {&result.query, &result.key, &result.value, &result.cu_seq_q}) {
      *tensor = level_.sample(*tensor, index);
    }
    for (OptionalTensor* tensor : {&result.cu_seq_k, &result.seqused_k, &result.alibi_slopes,
                                   &result.sink, &result.dropout_seed, &result.block_table,
                                   &result.leftpad_k, &result.k_scale, &result.v_scale}) {
      *tensor = sampled(*tensor, index);
    }
    return result;
  }
  VarlenGradients gradient_sample(std::int64_t index) const {
    return {.grad_out = level_.sample(gradients_->grad_out, index),
            .grad_logsumexp = sampled(gradients_->grad_logsumexp, index),
            .out = level_.sample(gradients_->out, index),
            .logsumexp = level_.sample(gradients_->logsumexp, index),
            .output_mask = gradients_->output_mask};
  }

  /// All samples as the heads of one call.
  VarlenArguments folded() const {
    VarlenArguments result = arguments_;
    for (at::Tensor* tensor : {&result.query, &result.key, &result.value}) {
      *tensor = fold(*tensor, 3);
    }
    result.sink = fold(result.sink, 1);
    result.alibi_slopes =
        fold(result.alibi_slopes, result.alibi_slopes.has_value() ? result.alibi_slopes->dim() : 1);
    result.dropout_seed = sampled(result.dropout_seed, 0);
    return result;
  }
  VarlenGradients folded_gradients() const {
    return {.grad_out = fold(gradients_->grad_out, 3),
            .grad_logsumexp = fold_rows(gradients_->grad_logsumexp),
            .out = fold(gradients_->out, 3),
            .logsumexp = *fold_rows(gradients_->logsumexp),
            .output_mask = gradients_->output_mask};
  }

  /// The samples of a result (total, mapped * heads, columns).
  at::Tensor unfold(const at::Tensor& tensor) const {
    if (!tensor.defined()) return tensor;
    return level_.wrap(apart(tensor, 1).movedim(1, 0));
  }
  /// The samples of a result (mapped * heads, ...).
  at::Tensor unfold_leading(const at::Tensor& tensor) const {
    return tensor.defined() ? level_.wrap(apart(tensor, 0)) : tensor;
  }
  at::Tensor wrap(const at::Tensor& stacked) const { return level_.wrap(stacked); }

 private:
  static std::vector<const at::Tensor*> all_tensors(const VarlenArguments& arguments,
                                                    const VarlenGradients* gradients) {
    std::vector<const at::Tensor*> tensors{&arguments.query,
                                           &arguments.key,
                                           &arguments.value,
                                           &arguments.cu_seq_q,
                                           given(arguments.cu_seq_k),
                                           given(arguments.seqused_k),
                                           given(arguments.alibi_slopes),
                                           given(arguments.sink),
                                           given(arguments.dropout_seed),
                                           given(arguments.block_table),
                                           given(arguments.leftpad_k),
                                           given(arguments.k_scale),
                                           given(arguments.v_scale)};
    if (gradients != nullptr) {
      tensors.insert(tensors.end(), {&gradients->grad_out, given(gradients->grad_logsumexp),
                                     &gradients->out, &gradients->logsumexp});
    }
    return tensors;
  }

  OptionalTensor sampled(const OptionalTensor& tensor, std::int64_t index) const {
    return given(tensor) == nullptr ? std::nullopt : OptionalTensor(level_.sample(*tensor, index));
  }
  bool is_mapped(const OptionalTensor& tensor) const {
    return given(tensor) != nullptr && level_.is_mapped(*tensor);
  }

  /// (mapped, ..., heads, [columns]) of `dims` dimensions behind the mapped one becomes
  /// (..., mapped * heads, [columns]).
  at::Tensor fold(const at::Tensor& tensor, std::int64_t dims) const {
    const at::Tensor samples = level_.fold_expanded(tensor, dims);
    const std::int64_t heads = dims == 1 ? 0 : 1;
    return samples.movedim(0, heads).flatten(heads, heads + 1);
  }
  OptionalTensor fold(const OptionalTensor& tensor, std::int64_t dims) const {
    return given(tensor) == nullptr ? std::nullopt : OptionalTensor(fold(*tensor, dims));
  }
  /// (mapped, heads, total) becomes (mapped * heads, total).
  OptionalTensor fold_rows(const OptionalTensor& tensor) const {
    if (given(tensor) == nullptr) return std::nullopt;
    return level_.fold_expanded(*tensor, 2).flatten(0, 1);
  }
  at::Tensor apart(const at::Tensor& tensor, std::int64_t dim) const {
    return tensor.unflatten_symint(dim, {level_.batch_size(), c10::SymInt(-1)});
  }

  const VarlenArguments& arguments_;
  const VarlenGradients* gradients_;
  VmapLevel level_;
};

struct Vmap {
  static VarlenForwardResult forward(const VarlenArguments& arguments) {
    const Samples samples("varlen_attention_forward", arguments, nullptr);
    if (!samples.are_heads()) {
      const auto outputs = stack_samples<2>(samples.count(), [&](std::int64_t index) {
        return call_varlen_attention_forward(samples.sample(index));
      });
      return {samples.wrap(outputs[0]), samples.wrap(outputs[1])};
    }
    const auto [out, logsumexp] = call_varlen_attention_forward(samples.folded());
    return {samples.unfold(out), samples.unfold_leading(logsumexp)};
  }

  static VarlenBackwardResult backward(const VarlenArguments& arguments,
                                       const VarlenGradients& gradients) {
    const Samples samples("varlen_attention_backward", arguments, &gradients);
    if (!samples.are_heads()) {
      const auto grads = stack_samples<4>(samples.count(), [&](std::int64_t index) {
        return call_varlen_attention_backward(samples.sample(index),
                                              samples.gradient_sample(index));
      });
      const auto wrap = [&samples](const at::Tensor& grad) {
        return grad.defined() ? samples.wrap(grad) : grad;
      };
      return {wrap(grads[0]), wrap(grads[1]), wrap(grads[2]), wrap(grads[3])};
    }
    const auto [grad_query, grad_key, grad_value, grad_sink] =
        call_varlen_attention_backward(samples.folded(), samples.folded_gradients());
    return {samples.unfold(grad_query), samples.unfold(grad_key), samples.unfold(grad_value),
            samples.unfold_leading(grad_sink)};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("varlen_attention_forward", TORCH_FN(VarlenEntries<Vmap>::forward));
  m.impl("varlen_attention_backward", TORCH_FN(VarlenEntries<Vmap>::backward));
}

}  // namespace torch_ext
