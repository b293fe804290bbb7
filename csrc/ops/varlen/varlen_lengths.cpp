#include "varlen_lengths.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace torch_ext {
namespace {

std::vector<std::int64_t> values_of(const at::Tensor& tensor) {
  std::vector<std::int64_t> values(static_cast<std::size_t>(tensor.size(0)));
  const std::int64_t stride = tensor.stride(0);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::int64_t offset = static_cast<std::int64_t>(i) * stride;
    values[i] = tensor.scalar_type() == at::kInt ? tensor.const_data_ptr<std::int32_t>()[offset]
                                                 : tensor.const_data_ptr<std::int64_t>()[offset];
  }
  return values;
}

std::vector<std::int64_t> cumulative(const char* op, const char* name, const at::Tensor& tensor,
                                     std::int64_t rows, const char* rows_of, const char* max_name,
                                     std::int64_t max_len) {
  std::vector<std::int64_t> values = values_of(tensor);
  TORCH_CHECK(values[0] == 0, "torch_ext::", op, ": ", name, " takes 0 as its first element, got ",
              values[0]);
  for (std::size_t i = 1; i < values.size(); ++i) {
    const std::int64_t length = values[i] - values[i - 1];
    TORCH_CHECK(length >= 0, "torch_ext::", op, ": ", name,
                " takes elements that never decrease, got ", values[i - 1], " before ", values[i],
                " at position ", i);
    TORCH_CHECK(length <= max_len, "torch_ext::", op, ": ", max_name,
                " takes the length of the longest sequence or more, got ", max_len,
                " with a sequence of ", length);
  }
  TORCH_CHECK(values.back() <= rows, "torch_ext::", op, ": ", name, " takes at most the rows of ",
              rows_of, ", ", rows, ", as its last element, got ", values.back());
  return values;
}

}  // namespace

VarlenLengths::VarlenLengths(const char* op, const VarlenArguments& arguments)
    : first_query_(cumulative(op, "cu_seq_q", arguments.cu_seq_q, arguments.query.size(0), "query",
                              "max_q", arguments.max_q.guard_int(__FILE__, __LINE__))) {
  if (given(arguments.block_table) == nullptr) {
    read_packed_keys(op, arguments);
  } else {
    read_pages(op, arguments);
  }
}

void VarlenLengths::read_packed_keys(const char* op, const VarlenArguments& arguments) {
  first_key_ = cumulative(op, "cu_seq_k", *given(arguments.cu_seq_k), arguments.key.size(0), "key",
                          "max_k", arguments.max_k.guard_int(__FILE__, __LINE__));
  const at::Tensor* used = given(arguments.seqused_k);
  if (used == nullptr) return;
  used_keys_ = values_of(*used);
  for (std::size_t i = 0; i < used_keys_.size(); ++i) {
    const std::int64_t keys = first_key_[i + 1] - first_key_[i];
    TORCH_CHECK(used_keys_[i] >= 0 && used_keys_[i] <= keys, "torch_ext::", op,
                ": seqused_k takes 0 up to the number of keys of each sequence, ", keys,
                " in sequence ", i, ", got ", used_keys_[i]);
  }
}

void VarlenLengths::read_pages(const char* op, const VarlenArguments& arguments) {
  block_table_ = given(arguments.block_table)->contiguous();
  const std::int64_t pages = arguments.key.size(0);
  const std::int64_t page_size = arguments.key.size(1);
  const std::int64_t columns = block_table_.size(1);
  const std::int64_t max_k = arguments.max_k.guard_int(__FILE__, __LINE__);
  const std::size_t count = first_query_.size() - 1;
  if (const at::Tensor* used = given(arguments.seqused_k)) {
    used_keys_ = values_of(*used);
  } else {
    const std::vector<std::int64_t> ends = values_of(*given(arguments.cu_seq_k));
    for (std::size_t i = 0; i < count; ++i) used_keys_.push_back(ends[i + 1] - ends[i]);
  }
  first_key_.assign(count + 1, 0);
  if (const at::Tensor* leftpad = given(arguments.leftpad_k)) {
    const std::vector<std::int64_t> values = values_of(*leftpad);
    std::copy(values.begin(), values.end(), first_key_.begin());
  }
  const std::int32_t* table = block_table_.const_data_ptr<std::int32_t>();
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t end = used_keys_[i];
    const std::int64_t begin = first_key_[i];
    TORCH_CHECK(end >= 0 && end <= columns * page_size, "torch_ext::", op,
                ": seqused_k takes 0 up to the rows of each sequence's pages, ",
                columns * page_size, ", got ", end, " for sequence ", i);
    TORCH_CHECK(end <= max_k, "torch_ext::", op,
                ": max_k takes the length of the longest sequence or more, got ", max_k,
                " with a sequence of ", end);
    TORCH_CHECK(begin >= 0 && begin <= end, "torch_ext::", op,
                ": leftpad_k takes 0 up to the used rows of each sequence, ", end, " in sequence ",
                i, ", got ", begin);
    for (std::int64_t page = begin / page_size; page * page_size < end; ++page) {
      const std::int64_t entry = table[static_cast<std::int64_t>(i) * columns + page];
      TORCH_CHECK(entry >= 0 && entry < pages, "torch_ext::", op,
                  ": block_table takes pages from 0 to ", pages - 1,
                  " within the used rows of a sequence, got ", entry, " at (", i, ", ", page, ")");
    }
    used_keys_[i] = end - begin;
  }
}

VarlenSequences VarlenLengths::sequences() const {
  VarlenSequences sequences{.count = static_cast<std::int64_t>(first_query_.size()) - 1,
                            .first_query = first_query_.data(),
                            .first_key = first_key_.data(),
                            .used_keys = used_keys_.empty() ? nullptr : used_keys_.data()};
  if (block_table_.defined()) {
    sequences.block_table = block_table_.const_data_ptr<std::int32_t>();
    sequences.table_stride = block_table_.size(1);
  }
  return sequences;
}

}  // namespace torch_ext
