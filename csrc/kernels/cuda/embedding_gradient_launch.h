// The programs of embedding_gradient_program.h in order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "embedding_gradient_program.h"

namespace torch_ext::cuda {

/// The tokens of an embedding sorted by the row that they name, which the device does without
/// telling the host how many rows there are. `gradient.rows`, `starts` and `positions` are not
/// used.
struct SortedEmbeddingGradient {
  EmbeddingGradientParams gradient;
  std::int64_t tokens = 0;
  const std::int64_t* sorted_rows = nullptr;  // (tokens,) increasing
  const std::int64_t* positions = nullptr;    // (tokens,) increasing within a row
  std::int64_t padding_row = -1;              // tokens that name it are left out
};

inline bool computes_in_double(const EmbeddingGradientParams& gradient) {
  return is_double(gradient.weight_grad.type) || is_double(gradient.grad_output.type);
}

inline std::size_t embedding_workspace(const SortedEmbeddingGradient& params) {
  const std::int64_t sums = embedding_token_blocks(params.tokens) * 2 * params.gradient.dim;
  return static_cast<std::size_t>(sums) *
         (computes_in_double(params.gradient) ? sizeof(double) : sizeof(float));
}

/// Whether every row of grad_output can be read four columns at a time.
inline bool reads_vectors(const EmbeddingGradientParams& gradient) {
  const ConstMatrix& grads = gradient.grad_output;
  const auto bytes = static_cast<std::uintptr_t>(kEmbeddingWidth * bytes_of(grads.type));
  return !computes_in_double(gradient) && grads.col_stride == 1 &&
         gradient.dim % kEmbeddingWidth == 0 && grads.row_stride % kEmbeddingWidth == 0 &&
         reinterpret_cast<std::uintptr_t>(grads.data) % bytes == 0;
}

namespace detail {

template <typename T, typename Launcher>
typename Launcher::Status launch_embedding_programs(const Launcher& launcher,
                                                    const EmbeddingArgs& args) {
  constexpr std::int64_t kWarps = kEmbeddingThreads / kWarpSize;
  const auto blocks = [&](std::int64_t units) {
    return (units * args.col_tiles + kWarps - 1) / kWarps;
  };
  const std::int64_t token_blocks = embedding_token_blocks(args.tokens);
  auto status = launcher.template launch<EmbeddingCheckProgram>(
      args, (args.tokens + kEmbeddingThreads - 1) / kEmbeddingThreads);
  if (status == Launcher::kSuccess && args.gradient.beta != 1.0) {
    status = launcher.template launch<EmbeddingGapProgram<T>>(args,
                                                              blocks(args.gradient.num_embeddings));
  }
  if (status == Launcher::kSuccess) {
    status = launcher.template launch<EmbeddingSumProgram<T>>(args, blocks(token_blocks));
  }
  if (status == Launcher::kSuccess && token_blocks > 1) {
    status = launcher.template launch<EmbeddingJoinProgram<T>>(args, blocks(token_blocks - 1));
  }
  return status;
}

}  // namespace detail

template <typename Launcher>
typename Launcher::Status launch_embedding_gradient(const Launcher& launcher,
                                                    const SortedEmbeddingGradient& params,
                                                    void* workspace) {
  const EmbeddingArgs args{
      params.gradient,    params.tokens,
      params.sorted_rows, params.positions,
      params.padding_row, (params.gradient.dim + kEmbeddingCols - 1) / kEmbeddingCols,
      workspace,          reads_vectors(params.gradient)};
  return computes_in_double(params.gradient)
             ? detail::launch_embedding_programs<double>(launcher, args)
             : detail::launch_embedding_programs<float>(launcher, args);
}

}  // namespace torch_ext::cuda
