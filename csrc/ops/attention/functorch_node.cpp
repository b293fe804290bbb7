#include "functorch_node.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <type_traits>

namespace torch_ext {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

class FormulaNode final : public Node {
 public:
  FormulaNode(const char* name, const variable_list& saved, BackwardFormula formula)
      : name_(name), formula_(std::move(formula)) {
    saved_.reserve(saved.size());
    for (const at::Tensor& tensor : saved) saved_.emplace_back(tensor, /*is_output=*/false);
  }

  variable_list apply(variable_list&& grads) override {
    variable_list saved;
    saved.reserve(saved_.size());
    for (const SavedVariable& variable : saved_) saved.push_back(variable.unpack());
    std::vector<bool> needs_input_grad(num_outputs());
    for (std::size_t input = 0; input < needs_input_grad.size(); ++input) {
      needs_input_grad[input] = task_should_compute_output(input);
    }
    return formula_(saved, grads, needs_input_grad);
  }

  void release_variables() override {
    for (SavedVariable& variable : saved_) variable.reset_data();
  }

  std::string name() const override { return name_; }

 private:
  const char* name_;
  std::vector<SavedVariable> saved_;
  BackwardFormula formula_;
};

/// What an Edge holds: an intrusive pointer, or a std::shared_ptr in older releases of torch, which
/// then needs torch's own deleter.
template <typename Pointer, typename NodeType, typename... Arguments>
Pointer make_node(Arguments&&... arguments) {
  auto* node = new NodeType(std::forward<Arguments>(arguments)...);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(node, [](auto* pointer) { deleteNode(pointer); });
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

}  // namespace

bool in_functorch_transform() {
  // Included while any transform is on functorch's stack. ATen/functorch/DynamicLayer.h, which has
  // the stack itself, needs a JSON library that torch does not install.
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return local.included_.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

void record_node(const char* name, const variable_list& outputs, const variable_list& inputs,
                 const variable_list& saved, BackwardFormula formula) {
  using Pointer = decltype(torch::autograd::Edge::function);
  const Pointer node = make_node<Pointer, FormulaNode>(name, saved, std::move(formula));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(outputs, node);
}

}  // namespace torch_ext
