#include "embedding_groups.h"

#include <array>
#include <utility>

namespace torch_ext {
namespace {

struct Token {
  std::int64_t row;
  std::int64_t position;
};

constexpr int kDigitBits = 11;  // 2048 counters: 16 KiB, within the first-level cache

/// Stable, least significant digit first: 50000 rows take two passes.
void sort_by_row(std::vector<Token>& tokens, std::int64_t num_embeddings) {
  std::vector<Token> other(tokens.size());
  for (int shift = 0; shift < 63 && (num_embeddings - 1) >> shift > 0; shift += kDigitBits) {
    constexpr std::int64_t kMask = (std::int64_t{1} << kDigitBits) - 1;
    std::array<std::size_t, kMask + 1> next{};
    for (const Token& token : tokens) {
      ++next[static_cast<std::size_t>(token.row >> shift & kMask)];
    }
    std::size_t sum = 0;
    for (std::size_t& digit : next) sum += std::exchange(digit, sum);
    for (const Token& token : tokens) {
      other[next[static_cast<std::size_t>(token.row >> shift & kMask)]++] = token;
    }
    tokens.swap(other);
  }
}

}  // namespace

template <typename Index>
std::optional<std::int64_t> find_index_out_of_range(const Index* indices, std::int64_t num_tokens,
                                                    std::int64_t num_embeddings) {
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    if (indices[i] < 0 || indices[i] >= num_embeddings) return indices[i];
  }
  return std::nullopt;
}

template <typename Index>
EmbeddingGroups group_by_row(const Index* indices, std::int64_t num_tokens,
                             std::int64_t num_embeddings, std::int64_t padding_idx) {
  std::vector<Token> tokens;
  tokens.reserve(static_cast<std::size_t>(num_tokens));
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    if (indices[i] != padding_idx) tokens.push_back({indices[i], i});
  }
  sort_by_row(tokens, num_embeddings);
  EmbeddingGroups groups;
  groups.positions.reserve(tokens.size());
  for (const Token& token : tokens) {
    if (groups.rows.empty() || groups.rows.back() != token.row) {
      groups.rows.push_back(token.row);
      groups.starts.push_back(static_cast<std::int64_t>(groups.positions.size()));
    }
    groups.positions.push_back(token.position);
  }
  groups.starts.push_back(static_cast<std::int64_t>(groups.positions.size()));
  return groups;
}

template std::optional<std::int64_t> find_index_out_of_range(const std::int64_t*, std::int64_t,
                                                             std::int64_t);
template std::optional<std::int64_t> find_index_out_of_range(const std::int32_t*, std::int64_t,
                                                             std::int64_t);
template EmbeddingGroups group_by_row(const std::int64_t*, std::int64_t, std::int64_t,
                                      std::int64_t);
template EmbeddingGroups group_by_row(const std::int32_t*, std::int64_t, std::int64_t,
                                      std::int64_t);

}  // namespace torch_ext
