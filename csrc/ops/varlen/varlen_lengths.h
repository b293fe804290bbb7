// What the integer tensors of a varlen call hold, read on the CPU and checked before anything else
// is read.
#pragma once

#include <cstdint>
#include <vector>

#include "../../kernels/varlen_sequences.h"
#include "varlen_arguments.h"

namespace torch_ext {

class VarlenLengths {
 public:
  /// Checks: cu_seq_q and cu_seq_k begin with 0, never decrease and end within the rows of query
  /// and key; no sequence is longer than max_q, max_k; seqused_k within each sequence's keys, or
  /// what its row of block_table reaches; the pages of the used rows are there.
  VarlenLengths(const char* op, const VarlenArguments& arguments);

  VarlenSequences sequences() const;
  std::int64_t end_of_queries() const { return first_query_.back(); }
  std::int64_t end_of_keys() const { return first_key_.back(); }

 private:
  void read_packed_keys(const char* op, const VarlenArguments& arguments);
  void read_pages(const char* op, const VarlenArguments& arguments);

  std::vector<std::int64_t> first_query_;
  std::vector<std::int64_t> first_key_;  // with pages: of each sequence among the rows of its pages
  std::vector<std::int64_t> used_keys_;
  at::Tensor block_table_;  // contiguous
};

}  // namespace torch_ext
