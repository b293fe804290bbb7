// Sequences of different lengths laid end to end along the rows of query, key and value (cu_seqlens
// in FlashAttention's words), and the call that one of them is on its own.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace torch_ext {

/// Sequence i has the queries [first_query[i], first_query[i + 1]) and the keys that begin at
/// first_key[i]: up to first_key[i + 1], or used_keys[i] of them where that is given.
struct VarlenSequences {
  std::int64_t count = 0;
  const std::int64_t* first_query = nullptr;  // (count + 1), never decreasing
  const std::int64_t* first_key = nullptr;    // (count + 1), never decreasing
  const std::int64_t* used_keys = nullptr;    // (count), or null

  /// Where keys and values lie in pages, (count, table_stride): then first_key counts the rows of a
  /// sequence's own pages, used_keys is there, and `call.pages` has the sizes.
  const std::int32_t* block_table = nullptr;
  std::int64_t table_stride = 0;

  /// Of stored keys and values, for each kv_head: with them each kv_head of a sequence is a call of
  /// its own.
  const float* key_scales = nullptr;
  const float* value_scales = nullptr;
  std::int64_t key_scale_stride = 0;  // 0: one for all
  std::int64_t value_scale_stride = 0;

  /// Dense calls that the sequences make.
  std::int64_t calls(const AttentionShape& shape) const {
    return key_scales == nullptr ? count : count * shape.kv_heads;
  }

  std::int64_t q_len(std::int64_t index) const {
    return first_query[index + 1] - first_query[index];
  }
  std::int64_t kv_len(std::int64_t index) const {
    return used_keys == nullptr ? first_key[index + 1] - first_key[index] : used_keys[index];
  }
};

/// Sequence i of a batch drops the weights that it drops alone with the seed + i times this.
inline constexpr std::uint64_t kSequenceSeedStep = 0x9E3779B97F4A7C15ull;

/// One of the calls: a sequence, of batch 1. `call` describes the whole tensors: its views have no
/// batch dimension, its shape has the heads and head dims, its logsumexp is (query_heads, rows)
/// with `logsumexp_head_stride`, its window counts from the lower right corner of each sequence.
AttentionForwardParams sequence_params(const AttentionForwardParams& call,
                                       const VarlenSequences& sequences, std::int64_t index);
AttentionBackwardParams sequence_params(const AttentionBackwardParams& call,
                                        const VarlenSequences& sequences, std::int64_t index);

}  // namespace torch_ext
