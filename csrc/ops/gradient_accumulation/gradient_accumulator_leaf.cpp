#include "gradient_accumulator_leaf.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "gradient_accumulator_take.h"

namespace torch_ext {
namespace {

/// Whether the running backward pass adds to this leaf's .grad: all do but those that name their
/// inputs.
bool accumulates_into(torch::autograd::Node* node) {
  const auto* const info = torch::autograd::get_current_graph_task_exec_info();
  if (info == nullptr || info->empty()) return true;
  const auto entry = info->find(node);
  return entry != info->end() && entry->second.needed_ && entry->second.captures_ == nullptr;
}

}  // namespace

bool may_bypass_autograd(const at::Tensor& param, bool ignore_node_hooks) {
  if (at::GradMode::is_enabled()) return false;  // create_graph=True
  const auto node = torch::autograd::impl::grad_accumulator(param);
  if (node == nullptr) return false;
  // Asked of the node: what saved-tensor hooks (checkpointing, save_on_cpu) have brought back in
  // the parameter's place has its node, and none of its hooks.
  if (has_tensor_hooks(*node)) return false;
  if (!ignore_node_hooks && has_foreign_hooks(*node)) return false;
  return accumulates_into(node.get());
}

}  // namespace torch_ext
