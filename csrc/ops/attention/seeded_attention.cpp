// torch_ext::attention_with_logsumexp, a composite.
#include "seeded_attention.h"

#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "attention_checks.h"
#include "attention_cpu.h"
#include "attention_signature.h"
#include "plain_dispatch.h"

namespace torch_ext {
namespace {

struct SeededAttention {
  static ForwardResult attention_with_logsumexp(const AttentionArguments& arguments) {
    // Its callers know it as attention_forward().
    return seeded_attention_forward("attention_forward", arguments, /*wants_logsumexp=*/true);
  }
};

/// As the dispatcher would record the call, for a profile.
std::vector<c10::IValue> recorded_inputs(const AttentionArguments& arguments) {
  return {*arguments.query, *arguments.key, *arguments.value, optional(arguments.attn_mask)};
}

ForwardResult plain_attention_forward(const AttentionArguments& arguments,
                                      const AttentionGeometry<std::int64_t>& geometry,
                                      bool wants_logsumexp) {
  RECORD_FUNCTION("torch_ext::attention_forward", recorded_inputs(arguments),
                  static_cast<std::int64_t>(at::sequence_number::peek()));
  if (needs_gradient(arguments.differentiable())) {
    return record_attention_forward(arguments, geometry);
  }
  if (wants_logsumexp) return CpuAttention::forward(arguments, geometry);
  at::Tensor out = attention_out(arguments, geometry);
  run_attention_forward_cpu(arguments, geometry, out, /*logsumexp=*/nullptr);
  return {std::move(out), at::Tensor()};
}

}  // namespace

ForwardResult seeded_attention_forward(const char* op, AttentionArguments arguments,
                                       bool wants_logsumexp) {
  const bool draws = arguments.dropout_p > 0.0 && arguments.dropout_seed == nullptr;
  const SeedArgument seed_argument = draws ? SeedArgument::kDrawnLater : SeedArgument::kRequired;
  const bool plain = is_plain_cpu_call(arguments.tensors());
  std::optional<AttentionGeometry<std::int64_t>> geometry;
  if (plain) {
    geometry = check_attention<std::int64_t>(op, arguments, seed_argument);
  } else {
    check_attention<c10::SymInt>(op, arguments, seed_argument);
  }
  arguments.contiguous = arguments.contiguous || is_variable(arguments.attn_mask);
  at::Tensor seed;
  if (draws) {
    seed = draw_dropout_seed(*arguments.query);
    arguments.dropout_seed = &seed;
  }
  return plain ? plain_attention_forward(arguments, *geometry, wants_logsumexp)
               : call_attention_forward(arguments);
}

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp_kernel<SeededAttention>));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp_kernel<SeededAttention>));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl("attention_with_logsumexp", TORCH_FN(attention_with_logsumexp_kernel<SeededAttention>));
}

}  // namespace torch_ext
