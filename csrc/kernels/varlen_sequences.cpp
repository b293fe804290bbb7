#include "varlen_sequences.h"

#include <type_traits>

namespace torch_ext {
namespace {

template <typename Pointer>
void move_rows(BasicStridedView<Pointer>& view, ScalarType type, std::int64_t rows) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  if (view.data == nullptr) return;
  view.data = static_cast<Byte*>(view.data) +
              rows * view.row_stride * static_cast<std::int64_t>(element_size(type));
}

// A pointer to logsumexp's type, `count` elements on.
template <typename Pointer>
void move_elements(Pointer& pointer, ScalarType type, std::int64_t count) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  if (pointer == nullptr) return;
  pointer = static_cast<Byte*>(pointer) + count * (type == ScalarType::kFloat64 ? 8 : 4);
}

// What the parameters of the two passes have in common.
template <typename Params>
Params common_params(const Params& call, const VarlenSequences& sequences, std::int64_t index) {
  Params params = call;
  const std::int64_t first_query = sequences.first_query[index];
  const std::int64_t first_key = sequences.first_key[index];
  params.shape.q_len = sequences.q_len(index);
  params.shape.kv_len = sequences.kv_len(index);
  move_rows(params.query, call.dtype, first_query);
  if (sequences.block_table == nullptr) {
    move_rows(params.key, call.dtype, first_key);
    move_rows(params.value, call.dtype, first_key);
  }
  move_rows(params.out, call.dtype, first_query);
  move_elements(params.logsumexp, call.dtype, first_query);
  params.transform.window.offset = params.shape.kv_len - params.shape.q_len;
  if (params.transform.alibi.data != nullptr) {
    params.transform.alibi.data += index * call.transform.alibi.batch_strides[kMaxBatchDims - 1];
  }
  // An odd number, of which no two multiples meet: each sequence drops weights of its own.
  params.dropout.seed_offset = static_cast<std::uint64_t>(index) * kSequenceSeedStep;
  return params;
}

void set_pages(AttentionForwardParams& params, const VarlenSequences& sequences,
               std::int64_t sequence) {
  if (sequences.block_table == nullptr) return;
  params.pages.table = sequences.block_table + sequence * sequences.table_stride;
  params.pages.first_row = sequences.first_key[sequence];
}

template <typename Pointer>
void move_heads(BasicStridedView<Pointer>& view, ScalarType type, std::int64_t heads) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  view.data = static_cast<Byte*>(view.data) +
              heads * view.head_stride * static_cast<std::int64_t>(element_size(type));
}

// One kv_head and its query heads, with the factors of what is stored.
void take_kv_head(AttentionForwardParams& params, const VarlenSequences& sequences,
                  std::int64_t kv_head) {
  const std::int64_t group = params.shape.group();
  const std::int64_t first_head = kv_head * group;
  params.shape.query_heads = group;
  params.shape.kv_heads = 1;
  move_heads(params.query, params.dtype, first_head);
  move_heads(params.out, params.dtype, first_head);
  move_heads(params.key, key_type(params), kv_head);
  move_heads(params.value, key_type(params), kv_head);
  move_elements(params.logsumexp, params.dtype, first_head * params.logsumexp_head_stride);
  move_elements(params.transform.sink, params.dtype, first_head);
  if (params.transform.alibi.data != nullptr) {
    params.transform.alibi.data += first_head * params.transform.alibi.head_stride;
  }
  params.transform.scale *= sequences.key_scales[kv_head * sequences.key_scale_stride];
  params.value_scale *= sequences.value_scales[kv_head * sequences.value_scale_stride];
}

}  // namespace

AttentionForwardParams sequence_params(const AttentionForwardParams& call,
                                       const VarlenSequences& sequences, std::int64_t index) {
  if (sequences.key_scales == nullptr) {
    AttentionForwardParams params = common_params(call, sequences, index);
    set_pages(params, sequences, index);
    return params;
  }
  const std::int64_t sequence = index / call.shape.kv_heads;
  AttentionForwardParams params = common_params(call, sequences, sequence);
  set_pages(params, sequences, sequence);
  take_kv_head(params, sequences, index % call.shape.kv_heads);
  return params;
}

AttentionBackwardParams sequence_params(const AttentionBackwardParams& call,
                                        const VarlenSequences& sequences, std::int64_t index) {
  AttentionBackwardParams params = common_params(call, sequences, index);
  const std::int64_t first_query = sequences.first_query[index];
  const std::int64_t first_key = sequences.first_key[index];
  const ScalarType grad_type = gradient_type(call);
  move_rows(params.grad_out, call.dtype, first_query);
  move_elements(params.grad_logsumexp, call.dtype, first_query);
  move_rows(params.grad_query, grad_type, first_query);
  move_rows(params.grad_key, grad_type, first_key);
  move_rows(params.grad_value, grad_type, first_key);
  move_elements(params.grad_sink, call.dtype, index * call.shape.query_heads);
  return params;
}

}  // namespace torch_ext
