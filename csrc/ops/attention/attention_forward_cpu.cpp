// torch_ext::attention_forward on the CPU.
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <limits>

#include "../../kernels/cpu/kernel_table.h"
#include "../task_runner_aten.h"
#include "attention_call.h"
#include "attention_checks.h"
#include "attention_cpu.h"
#include "attention_layout.h"
#include "attention_operators.h"
#include "attention_path.h"

namespace torch_ext {

std::int64_t attention_workers(const AttentionGeometry<std::int64_t>& geometry) {
  // Waking a thread costs a few microseconds: about as long as one core takes for 2^19 operations.
  constexpr double kOperationsPerWorker = 1 << 19;
  const double operations =
      2.0 * static_cast<double>(attention_shape(geometry).batch() * geometry.query_heads) *
      static_cast<double>(geometry.q_len) * static_cast<double>(geometry.kv_len) *
      static_cast<double>(geometry.head_dim + geometry.value_dim);
  return 1 + static_cast<std::int64_t>(operations / kOperationsPerWorker);
}

void run_attention_forward_cpu(const AttentionArguments& arguments, std::int64_t causal_offset,
                               const AttentionGeometry<std::int64_t>& geometry,
                               const at::Tensor& out, const at::Tensor* logsumexp) {
  if (has_no_scores(geometry)) {
    out.zero_();
    if (logsumexp != nullptr) logsumexp->fill_(-std::numeric_limits<double>::infinity());
    return record_attention_path("cpu.empty");
  }
  const AttentionForwardParams params =
      forward_params(arguments, causal_offset, geometry, out, logsumexp);
  const KernelTable& table = kernel_table();
  const AtenTaskRunner runner(attention_workers(geometry));
  const std::size_t bytes = table.attention_forward_workspace(params, runner.num_workers());
  const at::DataPtr workspace = c10::GetCPUAllocator()->allocate(bytes);  // 64-byte aligned
  record_attention_path(table.attention_forward(params, runner, workspace.get()));
}

namespace {

ForwardResult attention_forward_cpu(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, const OptionalTensor& attn_mask,
                                    double dropout_p, bool is_causal, std::optional<double> scale,
                                    bool enable_gqa, std::int64_t causal_offset,
                                    const OptionalTensor& key_padding_mask,
                                    const OptionalTensor& dropout_seed, bool contiguous) {
  const AttentionArguments arguments{.query = query,
                                     .key = key,
                                     .value = value,
                                     .attn_mask = given(attn_mask),
                                     .dropout_p = dropout_p,
                                     .is_causal = is_causal,
                                     .scale = scale,
                                     .enable_gqa = enable_gqa,
                                     .key_padding_mask = given(key_padding_mask),
                                     .dropout_seed = given(dropout_seed),
                                     .contiguous = contiguous};
  const auto geometry =
      check_attention<std::int64_t>("attention_forward", arguments, SeedArgument::kRequired);
  at::Tensor out = attention_out(arguments, geometry);
  at::Tensor logsumexp = at::empty(geometry.logsumexp_sizes(),
                                   query.options().dtype(accumulate_type(query.scalar_type())));
  run_attention_forward_cpu(arguments, causal_offset, geometry, out, &logsumexp);
  return {std::move(out), std::move(logsumexp)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("attention_forward", TORCH_FN(attention_forward_cpu));
}

}  // namespace torch_ext
