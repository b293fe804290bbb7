// The mini-batch operators as functions, through the dispatcher: every device's kernel, and its
// checks.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <utility>

#include "accumulation_operators.h"

namespace torch_ext {

template <typename Op, typename... Args>
void call_operator(Args&&... args) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("torch_ext::") + Op::kName).c_str(), Op::kOverload)
          .template typed<typename Op::Signature>();
  op.call(std::forward<Args>(args)...);
}

/// norm, norms, found_inf
GradStatsResult call_grad_stats(at::TensorList grads);

}  // namespace torch_ext
