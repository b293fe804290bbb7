// Schemas of the mini-batch operators.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string>

namespace torch_ext {

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "grad_accumulate_(Tensor(a!)[] accumulators, Tensor[] grads, *, float beta=1.0, "
      "Tensor? scale=None) -> ()",
      tags);
  m.def("grad_stats(Tensor[] grads) -> (Tensor norm, Tensor norms, Tensor found_inf)", tags);
  m.def(
      "linear_wgrad_(Tensor(a!) weight_grad, Tensor(b!)? bias_grad, Tensor grad_output, "
      "Tensor input, *, float beta=1.0) -> ()",
      tags);
  m.def(
      "embedding_wgrad_(Tensor(a!) weight_grad, Tensor indices, Tensor grad_output, *, "
      "int padding_idx=-1, bool scale_grad_by_freq=False, float beta=1.0) -> ()",
      tags);
  const auto adamw = [](const char* name, const char* lr) {
    return name +
           std::string(
               "(Tensor(a!)[] params, Tensor(b!)[] accumulators, Tensor(c!)[] exp_avgs, "
               "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, "
               "Tensor(f!)[] master_params, Tensor(g!)[] steps, *, ") +
           lr +
           " lr, float beta1=0.9, float beta2=0.999, float eps=1e-8, float weight_decay=0.0, "
           "bool decoupled=True, bool amsgrad=False, bool maximize=False, "
           "Tensor? coefficient=None, Tensor? found_inf=None, bool reset=True) -> ()";
  };
  m.def(adamw("adamw_step_", "float").c_str(), tags);
  m.def(adamw("adamw_step_.tensor_lr", "Tensor").c_str(), tags);
  const auto sgd = [](const char* name, const char* lr) {
    return name +
           std::string(
               "(Tensor(a!)[] params, Tensor(b!)[] accumulators, Tensor(c!)[] momentum_buffers, "
               "Tensor(d!)[] master_params, *, ") +
           lr +
           " lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, "
           "bool nesterov=False, bool maximize=False, bool[] first_step=[], "
           "Tensor? coefficient=None, Tensor? found_inf=None, bool reset=True) -> ()";
  };
  m.def(sgd("sgd_step_", "float").c_str(), tags);
  m.def(sgd("sgd_step_.tensor_lr", "Tensor").c_str(), tags);
}

}  // namespace torch_ext
