#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>

#include "gradient_accumulator_calls.h"
#include "gradient_accumulator_layers.h"
#include "gradient_accumulator_leaf.h"

namespace torch_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct AccumulatingEmbedding : torch::autograd::Function<AccumulatingEmbedding> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& indices,
                            const at::Tensor& weight, std::int64_t padding_idx,
                            bool scale_grad_by_freq,
                            const c10::intrusive_ptr<AccumulatorCore>& core,
                            std::int64_t weight_index) {
    context->set_materialize_grads(false);
    // Not the weight, which may be written before backward, as with torch's own.
    context->save_for_backward({indices});
    context->saved_data["num_embeddings"] = weight.size(0);
    context->saved_data["core"] = core;
    context->saved_data["weight_index"] = weight_index;
    context->saved_data["padding_idx"] = padding_idx;
    context->saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
    return at::embedding(weight, indices, padding_idx, scale_grad_by_freq, /*sparse=*/false);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(6);
    const at::Tensor& grad = grads[0];
    if (!grad.defined() || !context->needs_input_grad(1)) return result;
    const at::Tensor indices = context->get_saved_variables()[0];
    const std::int64_t padding_idx = context->saved_data["padding_idx"].toInt();
    const bool by_frequency = context->saved_data["scale_grad_by_freq"].toBool();
    const auto core = context->saved_data["core"].toCustomClass<AccumulatorCore>();
    const auto index = static_cast<std::size_t>(context->saved_data["weight_index"].toInt());
    if (core->is_open() && may_bypass_autograd(core->param(index), core->ignores_node_hooks())) {
      const std::lock_guard<std::mutex> lock(core->kernel_mutex());
      const auto destination = core->claim(index);
      call_operator<EmbeddingWgrad>(destination.sum, indices, grad, padding_idx, by_frequency,
                                    destination.beta);
    } else {
      result[1] =
          at::embedding_backward(grad, indices, context->saved_data["num_embeddings"].toInt(),
                                 padding_idx, by_frequency, /*sparse=*/false);
    }
    return result;
  }
};

}  // namespace

at::Tensor accumulating_embedding(const c10::intrusive_ptr<AccumulatorCore>& core,
                                  const at::Tensor& indices, const at::Tensor& weight,
                                  std::int64_t padding_idx, bool scale_grad_by_freq,
                                  std::int64_t weight_index) {
  return AccumulatingEmbedding::apply(indices, weight, padding_idx, scale_grad_by_freq, core,
                                      weight_index);
}

}  // namespace torch_ext
