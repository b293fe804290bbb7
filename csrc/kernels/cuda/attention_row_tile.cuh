// Where a block of a forward pass works, and where it leaves a part of its result.
#pragma once

#include "attention_score_tile.cuh"

namespace torch_ext::cuda {

/// Where block `index` of a forward pass works. Tiles are numbered from the last one where causal:
/// the longest first.
TORCH_EXT_DEVICE RowTile locate_row_tile(const AttentionForwardArgs& args, std::int64_t index,
                                         int tile_rows) {
  const DeviceShape& shape = args.shape;
  RowTile tile;
  std::int64_t number = index % args.row_tiles;
  if (args.masking.is_causal) number = args.row_tiles - 1 - number;
  tile.slice = index / args.row_tiles % args.slices();
  tile.split = index / (args.row_tiles * args.slices());
  const std::int64_t heads = shape.query_heads / args.pack;
  tile.batch = tile.slice / heads;
  tile.first_head = tile.slice % heads * args.pack;
  tile.kv_head = tile.first_head / shape.group;
  tile.pack = static_cast<int>(args.pack);
  tile.first_row = static_cast<int>(number * tile_rows);
  tile.rows = static_cast<int>(min_of<std::int64_t>(tile_rows, args.rows() - tile.first_row));
  tile.first_query = tile.query_of(0);
  tile.last_query = tile.query_of(tile.rows - 1);
  tile.key_begin = static_cast<int>(tile.split * args.split_len);
  tile.key_end = static_cast<int>(
      min_of(args.masking.key_end(tile.last_query, shape.kv_len), tile.key_begin + args.split_len));
  tile.all_key_end = static_cast<int>(args.masking.key_end(tile.first_query, shape.kv_len));
  tile.locate_starts(args);
  return tile;
}

/// Where a row's part of a split goes.
TORCH_EXT_DEVICE std::int64_t partial_row(const AttentionForwardArgs& args, const RowTile& tile,
                                          int row) {
  return (tile.split * args.slices() + tile.slice) * args.rows() + tile.first_row + row;
}

/// A row's maximum and sum, for the join of the splits, or its logsumexp.
template <typename Block>
TORCH_EXT_DEVICE void store_row_stats(Block& block, const AttentionForwardArgs& args,
                                      const RowTile& tile, int row, float maximum, float sum) {
  if (args.partial_stats != nullptr) {
    float* stats = static_cast<float*>(args.partial_stats) + partial_row(args, tile, row) * 2;
    stats[0] = maximum;
    stats[1] = sum;
  } else if (args.logsumexp != nullptr) {
    const std::int64_t slice =
        tile.batch * args.shape.query_heads + tile.first_head + tile.head_of(row);
    static_cast<float*>(args.logsumexp)[slice * args.shape.q_len + tile.query_of(row)] =
        row_logsumexp(block, maximum, static_cast<float>(args.unit), sum);
  }
}

}  // namespace torch_ext::cuda
