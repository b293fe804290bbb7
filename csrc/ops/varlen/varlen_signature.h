// The positional lists of the varlen operators: the only place that spells them out.
#pragma once

#include "varlen_arguments.h"

namespace torch_ext {

/// The operators' C++ signatures, gathered for `Backend::forward(VarlenArguments)` and
/// `Backend::backward(VarlenArguments, VarlenGradients)`.
template <typename Backend>
struct VarlenEntries {
  static VarlenForwardResult forward(const at::Tensor& query, const at::Tensor& key,
                                     const at::Tensor& value, const at::Tensor& cu_seq_q,
                                     const OptionalTensor& cu_seq_k, c10::SymInt max_q,
                                     c10::SymInt max_k, double dropout_p,
                                     std::optional<double> scale, at::IntArrayRef window_size,
                                     bool enable_gqa, const OptionalTensor& seqused_k,
                                     double softcap, const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sink, const OptionalTensor& dropout_seed,
                                     const OptionalTensor& block_table,
                                     const OptionalTensor& leftpad_k, const OptionalTensor& k_scale,
                                     const OptionalTensor& v_scale) {
    VarlenArguments arguments = gather(query, key, value, cu_seq_q, cu_seq_k, std::move(max_q),
                                       std::move(max_k), dropout_p, scale, window_size, enable_gqa,
                                       seqused_k, softcap, alibi_slopes, sink, dropout_seed);
    arguments.block_table = block_table;
    arguments.leftpad_k = leftpad_k;
    arguments.k_scale = k_scale;
    arguments.v_scale = v_scale;
    return Backend::forward(std::move(arguments));
  }

  static VarlenBackwardResult backward(
      const at::Tensor& grad_out, const OptionalTensor& grad_logsumexp, const at::Tensor& query,
      const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
      const at::Tensor& logsumexp, const at::Tensor& cu_seq_q, const at::Tensor& cu_seq_k,
      c10::SymInt max_q, c10::SymInt max_k, double dropout_p, std::optional<double> scale,
      at::IntArrayRef window_size, bool enable_gqa, const OptionalTensor& seqused_k, double softcap,
      const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
      const OptionalTensor& dropout_seed, std::array<bool, 4> output_mask) {
    return Backend::backward(gather(query, key, value, cu_seq_q, cu_seq_k, std::move(max_q),
                                    std::move(max_k), dropout_p, scale, window_size, enable_gqa,
                                    seqused_k, softcap, alibi_slopes, sink, dropout_seed),
                             VarlenGradients{.grad_out = grad_out,
                                             .grad_logsumexp = grad_logsumexp,
                                             .out = out,
                                             .logsumexp = logsumexp,
                                             .output_mask = output_mask});
  }

 private:
  static VarlenArguments gather(const at::Tensor& query, const at::Tensor& key,
                                const at::Tensor& value, const at::Tensor& cu_seq_q,
                                const OptionalTensor& cu_seq_k, c10::SymInt max_q,
                                c10::SymInt max_k, double dropout_p, std::optional<double> scale,
                                at::IntArrayRef window_size, bool enable_gqa,
                                const OptionalTensor& seqused_k, double softcap,
                                const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                                const OptionalTensor& dropout_seed) {
    VarlenArguments arguments;
    arguments.query = query;
    arguments.key = key;
    arguments.value = value;
    arguments.cu_seq_q = cu_seq_q;
    arguments.cu_seq_k = cu_seq_k;
    arguments.max_q = std::move(max_q);
    arguments.max_k = std::move(max_k);
    arguments.dropout_p = dropout_p;
    arguments.scale = scale;
    arguments.window_size = {window_size[0], window_size[1]};
    arguments.enable_gqa = enable_gqa;
    arguments.seqused_k = seqused_k;
    arguments.softcap = softcap;
    arguments.alibi_slopes = alibi_slopes;
    arguments.sink = sink;
    arguments.dropout_seed = dropout_seed;
    return arguments;
  }
};

}  // namespace torch_ext
