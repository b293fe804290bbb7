// What torch's own in-place operators do about autograd, for the operators that write their
// arguments: tensors that require grad are refused while a graph is being recorded, and version
// counters move, so that a later backward through a changed tensor raises instead of being wrong.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "accumulation_operators.h"

namespace torch_ext {
namespace {

void refuse_gradient(const char* op, const at::Tensor& tensor, bool is_written) {
  if (!tensor.defined() || !tensor.requires_grad()) return;
  TORCH_CHECK(!is_written, "torch_ext::", op,
              " takes destinations that do not require grad while grad mode is on, got one that "
              "does, of sizes ",
              tensor.sym_sizes(), "; call it under torch.no_grad()");
  TORCH_CHECK(false, "torch_ext::", op,
              " is not differentiable: it takes tensors that do not require grad while grad mode "
              "is on, got one that does, of sizes ",
              tensor.sym_sizes(), "; detach it, or call under torch.no_grad()");
}

template <typename Visit>
void visit_tensors(const at::Tensor& tensor, const Visit& visit) {
  visit(tensor);
}
template <typename Visit>
void visit_tensors(const OptionalTensor& tensor, const Visit& visit) {
  if (tensor.has_value()) visit(*tensor);
}
template <typename Visit>
void visit_tensors(at::TensorList tensors, const Visit& visit) {
  for (const at::Tensor& tensor : tensors) visit(tensor);
}
template <typename Other, typename Visit>
requires(std::is_arithmetic_v<Other>) void visit_tensors(Other, const Visit&) {}
template <typename Visit>
void visit_tensors(const c10::List<bool>&, const Visit&) {}

template <typename Op, typename Signature = typename Op::Signature>
struct MutationRules;

template <typename Op, typename... Args>
struct MutationRules<Op, void(Args...)> {
  static const c10::TypedOperatorHandle<void(Args...)>& handle() {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow((std::string("torch_ext::") + Op::kName).c_str(), Op::kOverload)
            .template typed<void(Args...)>();
    return op;
  }

  static void autograd(c10::DispatchKeySet keys, Args... args) {
    const bool records = at::GradMode::is_enabled();
    std::uint32_t position = 1;
    const auto refuse = [&](const auto& arg) {
      const bool is_written = (Op::kWritten & position) != 0;
      visit_tensors(arg, [&](const at::Tensor& tensor) {
        refuse_tangent(Op::kName, tensor);
        if (records) refuse_gradient(Op::kName, tensor, is_written);
      });
      position <<= 1;
    };
    (refuse(args), ...);
    const at::AutoDispatchBelowAutograd guard;
    handle().redispatch(keys & c10::after_autograd_keyset, args...);
  }

  static void in_place(c10::DispatchKeySet keys, Args... args) {
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      handle().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
    }
    std::uint32_t position = 1;
    const auto bump = [&](const auto& arg) {
      if ((Op::kWritten & position) != 0) {
        visit_tensors(arg, [](const at::Tensor& tensor) {
          if (tensor.defined() && !tensor.is_inference()) {
            tensor.unsafeGetTensorImpl()->bump_version();
          }
        });
      }
      position <<= 1;
    };
    (bump(args), ...);
  }
};

template <typename Op>
std::string full_name() {
  return *Op::kOverload == '\0' ? std::string(Op::kName)
                                : std::string(Op::kName) + "." + Op::kOverload;
}

template <typename... Ops>
void register_autograd(torch::Library& m) {
  (m.impl(full_name<Ops>().c_str(), TORCH_FN(MutationRules<Ops>::autograd)), ...);
}

template <typename... Ops>
void register_in_place(torch::Library& m) {
  (m.impl(full_name<Ops>().c_str(), TORCH_FN(MutationRules<Ops>::in_place)), ...);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) {
  register_autograd<GradAccumulate, LinearWgrad, EmbeddingWgrad, AdamwStep<double>,
                    AdamwStep<const at::Tensor&>, SgdStep<double>, SgdStep<const at::Tensor&>>(m);
}

TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  register_in_place<GradAccumulate, LinearWgrad, EmbeddingWgrad, AdamwStep<double>,
                    AdamwStep<const at::Tensor&>, SgdStep<double>, SgdStep<const at::Tensor&>>(m);
}

}  // namespace torch_ext
