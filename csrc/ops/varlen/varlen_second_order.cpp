#include "varlen_second_order.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../../kernels/varlen_sequences.h"
#include "../attention/attention_arguments.h"
#include "../attention/attention_second_order.h"

namespace torch_ext {
namespace {

std::vector<std::int64_t> items_of(const at::Tensor& tensor) {
  // By way of item(), which tensors wrapped by a transform answer too.
  std::vector<std::int64_t> values;
  for (std::int64_t i = 0; i < tensor.size(0); ++i) {
    values.push_back(tensor.select(0, i).item<std::int64_t>());
  }
  return values;
}

/// One sequence's rows of a tensor (rows, heads, columns), as (heads, rows, columns).
at::Tensor heads_of(const at::Tensor& tensor, std::int64_t first, std::int64_t count) {
  return tensor.defined() ? tensor.narrow(0, first, count).transpose(0, 1) : tensor;
}
/// One sequence's columns of a tensor (heads, rows).
at::Tensor rows_of(const at::Tensor& tensor, std::int64_t first, std::int64_t count) {
  return tensor.defined() ? tensor.narrow(1, first, count) : tensor;
}

/// Puts sequences' results together along `dim`, zero where there are none.
class Parts {
 public:
  Parts(const at::Tensor& like, std::int64_t dim) : like_(like), dim_(dim) {}

  void add(const at::Tensor& part, std::int64_t first) {
    if (!part.defined()) return;
    fill(first);
    parts_.push_back(part);
    end_ = first + part.size(dim_);
  }
  at::Tensor result() {
    if (parts_.empty()) return {};
    fill(like_.size(dim_));
    return at::cat(parts_, dim_).to(like_.scalar_type());
  }

 private:
  void fill(std::int64_t end) {
    if (end_ >= end) return;
    std::vector<std::int64_t> sizes = like_.sizes().vec();
    sizes[static_cast<std::size_t>(dim_)] = end - end_;
    parts_.push_back(at::zeros(sizes, like_.options()));
    end_ = end;
  }

  const at::Tensor& like_;
  std::int64_t dim_;
  std::int64_t end_ = 0;
  std::vector<at::Tensor> parts_;
};

/// One sequence's dense call, whose tensors it holds.
struct SequenceCall {
  AttentionTensors tensors;
  at::Tensor grad_out;
  at::Tensor grad_logsumexp;
  std::vector<at::Tensor> grads;

  AttentionArguments arguments(const VarlenArguments& call) const {
    AttentionArguments options;
    options.dropout_p = call.dropout_p;
    options.scale = call.scale;
    options.enable_gqa = true;
    options.window_left = call.window_size[0];
    options.window_right = call.window_size[1];
    options.softcap = call.softcap;
    options.causal_lower_right = true;
    return options.with_tensors(tensors);
  }
};

SequenceCall call_of(const VarlenArguments& call, std::int64_t index, std::int64_t first_q,
                     std::int64_t q_len, std::int64_t first_k, std::int64_t kv_len) {
  SequenceCall result;
  result.tensors[kQuery] = heads_of(call.query, first_q, q_len);
  result.tensors[kKey] = heads_of(call.key, first_k, kv_len);
  result.tensors[kValue] = heads_of(call.value, first_k, kv_len);
  if (const at::Tensor* sink = given(call.sink)) result.tensors[kSink] = *sink;
  if (const at::Tensor* slopes = given(call.alibi_slopes)) {
    result.tensors[kAlibi] = slopes->dim() == 2 ? slopes->select(0, index) : *slopes;
  }
  if (const at::Tensor* seed = given(call.dropout_seed)) {
    const auto step = static_cast<std::uint64_t>(index) * kSequenceSeedStep;
    result.tensors[kSeed] = *seed + static_cast<std::int64_t>(step);
  }
  return result;
}

}  // namespace

std::vector<at::Tensor> varlen_second_order(const VarlenArguments& arguments,
                                            const at::Tensor& grad_out,
                                            const at::Tensor& grad_logsumexp,
                                            const std::vector<at::Tensor>& grads,
                                            const std::vector<bool>& needs_grad) {
  const bool any = std::any_of(grads.begin(), grads.end(),
                               [](const at::Tensor& grad) { return grad.defined(); });
  if (!any) return std::vector<at::Tensor>(6);
  std::array<bool, 2 + kGradientCount> needs{};
  needs[0] = needs_grad[0];  // grad_out
  needs[1] = needs_grad[1];  // grad_logsumexp
  needs[2 + kQuery] = needs_grad[2];
  needs[2 + kKey] = needs_grad[3];
  needs[2 + kValue] = needs_grad[4];
  needs[2 + kSink] = needs_grad[5];
  const std::vector<std::int64_t> queries = items_of(arguments.cu_seq_q);
  const std::vector<std::int64_t> keys = items_of(*given(arguments.cu_seq_k));
  std::vector<std::int64_t> used;
  if (const at::Tensor* tensor = given(arguments.seqused_k)) used = items_of(*tensor);

  Parts out_parts(grad_out, 0);
  Parts logsumexp_parts(grad_logsumexp, 1);
  Parts query_parts(arguments.query, 0);
  Parts key_parts(arguments.key, 0);
  Parts value_parts(arguments.value, 0);
  at::Tensor sink_sum;
  const auto rows_first = [](const at::Tensor& heads) {
    return heads.defined() ? heads.transpose(0, 1) : heads;
  };
  for (std::size_t i = 0; i + 1 < queries.size(); ++i) {
    const std::int64_t q_len = queries[i + 1] - queries[i];
    const std::int64_t kv_len = used.empty() ? keys[i + 1] - keys[i] : used[i];
    SequenceCall call =
        call_of(arguments, static_cast<std::int64_t>(i), queries[i], q_len, keys[i], kv_len);
    call.grad_out = heads_of(grad_out, queries[i], q_len);
    call.grad_logsumexp = rows_of(grad_logsumexp, queries[i], q_len);
    call.grads.resize(kGradientCount);
    call.grads[kQuery] = heads_of(grads[0], queries[i], q_len);
    call.grads[kKey] = heads_of(grads[1], keys[i], kv_len);
    call.grads[kValue] = heads_of(grads[2], keys[i], kv_len);
    call.grads[kSink] = grads[3];
    const AttentionGradients gradients{
        .grad_out = &call.grad_out,
        .grad_logsumexp = call.grad_logsumexp.defined() ? &call.grad_logsumexp : nullptr};
    const std::vector<at::Tensor> result =
        attention_second_order(call.arguments(arguments), gradients, call.grads, needs);
    out_parts.add(rows_first(result[0]), queries[i]);
    logsumexp_parts.add(result[1], queries[i]);
    query_parts.add(rows_first(result[2 + kQuery]), queries[i]);
    key_parts.add(rows_first(result[2 + kKey]), keys[i]);
    value_parts.add(rows_first(result[2 + kValue]), keys[i]);
    const at::Tensor& sink = result[2 + kSink];
    if (sink.defined()) sink_sum = sink_sum.defined() ? sink_sum + sink : sink;
  }
  return {out_parts.result(), logsumexp_parts.result(), query_parts.result(),
          key_parts.result(), value_parts.result(),     sink_sum};
}

}  // namespace torch_ext
