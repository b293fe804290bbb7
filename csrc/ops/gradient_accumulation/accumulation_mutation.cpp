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

/// Where in an operator's arguments a tensor is.
struct ArgumentPlace {
  const c10::FunctionSchema& schema;
  std::size_t argument;
  std::size_t index;
  bool is_list;

  std::string name() const {
    const std::string& argument_name = schema.arguments()[argument].name();
    return schema.name() + ": " +
           (is_list ? argument_name + "[" + std::to_string(index) + "]" : argument_name);
  }
};

void refuse_gradient(const ArgumentPlace& place, bool is_written) {
  TORCH_CHECK(!is_written, place.name(),
              " takes a tensor that does not require grad while grad mode is on, got one that "
              "does: it is written; call the operator under torch.no_grad()");
  TORCH_CHECK(false, place.name(),
              " takes a tensor that does not require grad while grad mode is on, got one that "
              "does: the operator is not differentiable; detach it, or call under "
              "torch.no_grad()");
}

/// What nothing below autograd gets to see: a subclass would answer in its own words.
void check_recordable(const ArgumentPlace& place, const at::Tensor& tensor, bool is_written,
                      bool records) {
  if (!tensor.defined()) return;
  TORCH_CHECK(!tensor.is_nested(), place.name(),
              " takes a dense tensor; nested tensors are not supported");
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), place.name(),
                              kNoForwardMode);
  if (records && tensor.requires_grad()) refuse_gradient(place, is_written);
}

// visit(tensor, its index in the argument, whether the argument is a list)
template <typename Visit>
void visit_tensors(const at::Tensor& tensor, const Visit& visit) {
  visit(tensor, std::size_t{0}, false);
}
template <typename Visit>
void visit_tensors(const OptionalTensor& tensor, const Visit& visit) {
  if (tensor.has_value()) visit(*tensor, std::size_t{0}, false);
}
template <typename Visit>
void visit_tensors(at::TensorList tensors, const Visit& visit) {
  for (std::size_t i = 0; i < tensors.size(); ++i) visit(tensors[i], i, true);
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

  static bool is_written(std::size_t argument) { return (Op::kWritten >> argument & 1) != 0; }

  static void autograd(c10::DispatchKeySet keys, Args... args) {
    const bool records = at::GradMode::is_enabled();
    std::size_t argument = 0;
    const auto check = [&](const auto& arg) {
      visit_tensors(arg, [&](const at::Tensor& tensor, std::size_t index, bool is_list) {
        check_recordable({handle().schema(), argument, index, is_list}, tensor,
                         is_written(argument), records);
      });
      ++argument;
    };
    (check(args), ...);
    const at::AutoDispatchBelowAutograd guard;
    handle().redispatch(keys & c10::after_autograd_keyset, args...);
  }

  static void in_place(c10::DispatchKeySet keys, Args... args) {
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      handle().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
    }
    std::size_t argument = 0;
    const auto bump = [&](const auto& arg) {
      if (is_written(argument)) {
        visit_tensors(arg, [](const at::Tensor& tensor, std::size_t, bool) {
          if (tensor.defined() && !tensor.is_inference()) {
            tensor.unsafeGetTensorImpl()->bump_version();
          }
        });
      }
      ++argument;
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
