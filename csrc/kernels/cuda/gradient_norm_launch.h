// The programs of gradient_norm_program.h in order, for a caller's list.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gradient_norm_program.h"
#include "list_launch.h"

namespace torch_ext::cuda {

/// Bytes: a sum for each entry, then one for each chunk.
inline std::size_t norm_workspace(const GradStatsParams& params) {
  std::int64_t sums = params.num_entries;
  for (std::int64_t i = 0; i < params.num_entries; ++i) {
    sums += count_chunks(params.entries[i].count, params.entries[i].loop);
  }
  return static_cast<std::size_t>(sums) * sizeof(SquareSum);
}

namespace detail {

/// Chunks and then entries of each list that the entries fill.
template <int kListBytes, typename Launcher, typename ItemOf>
typename Launcher::Status launch_entry_norms(const Launcher& launcher,
                                             const GradStatsParams& params, const ItemOf& item_of,
                                             SquareSum* entry_sums) {
  using ChunkNorms = ChunkNormProgram<kListBytes>;
  using EntryNorms = EntryNormProgram<kListBytes>;
  typename ChunkNorms::Args chunk_args;
  chunk_args.chunk_sums = entry_sums + params.num_entries;
  chunk_args.in_double = is_double(params.norm_type);
  const auto launch = [&](const auto& list) {
    const auto status = launcher.template launch<ChunkNorms>(chunk_args, ChunkNorms::blocks(list));
    if (status != Launcher::kSuccess) return status;
    const typename EntryNorms::Args entry_args{chunk_args.chunk_sums, entry_sums, params.norms,
                                               params.norm_type, list};
    return launcher.template launch<EntryNorms>(entry_args, EntryNorms::blocks(list));
  };
  return launch_lists(chunk_args.list, params.num_entries, Launcher::kSuccess, Launcher::kTooLarge,
                      item_of, launch);
}

}  // namespace detail

template <typename Launcher>
typename Launcher::Status launch_norms(const Launcher& launcher, const GradStatsParams& params,
                                       void* workspace) {
  const auto item_of = [&](std::int64_t i) {
    const GradStatsEntry& entry = params.entries[i];
    return ListItem<1>{
        {const_cast<void*>(entry.grad.data)}, {entry.grad.type}, entry.count, entry.loop, false};
  };
  auto* const entry_sums = static_cast<SquareSum*>(workspace);
  const auto status =
      fits_small_list<1>(params.num_entries, item_of)
          ? detail::launch_entry_norms<kSmallListBytes>(launcher, params, item_of, entry_sums)
          : detail::launch_entry_norms<kLargeListBytes>(launcher, params, item_of, entry_sums);
  if (status != Launcher::kSuccess) return status;
  return launcher.template launch<TotalNormProgram>(
      {entry_sums, params.num_entries, params.norm, params.norm_type, params.found_inf}, 1);
}

}  // namespace torch_ext::cuda
