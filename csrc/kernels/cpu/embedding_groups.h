// The tokens of an embedding, grouped by the row that they name.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace torch_ext {

struct EmbeddingGroups {
  std::vector<std::int64_t> rows;       // increasing
  std::vector<std::int64_t> starts;     // one more than rows
  std::vector<std::int64_t> positions;  // tokens by row, in increasing order within a row
};

/// The first index outside [0, num_embeddings), if any.
template <typename Index>
std::optional<std::int64_t> find_index_out_of_range(const Index* indices, std::int64_t num_tokens,
                                                    std::int64_t num_embeddings);

/// Indices in range only; tokens that name `padding_idx` are left out.
template <typename Index>
EmbeddingGroups group_by_row(const Index* indices, std::int64_t num_tokens,
                             std::int64_t num_embeddings, std::int64_t padding_idx);

}  // namespace torch_ext
