// Masks on single natural scores, and on whole tiles. A masked score becomes -inf by
// selection, so that a NaN there does not survive.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device_attention.h"
#include "online_softmax.cuh"

namespace torch_ext::cuda {

/// A finite mask does not make -inf of a score: the lowest value of the dtype masks rows for those
/// who want uniform weights where nothing is left.
template <typename T>
TORCH_EXT_DEVICE constexpr T lowest_score() {
  return static_cast<T>(sizeof(T) == 8 ? -1.7976931348623157e308 : -3.4028234663852886e38);
}

/// Weights 2^x with x below this are 0.
template <typename T>
TORCH_EXT_DEVICE constexpr T negligible_exponent() {
  return static_cast<T>(sizeof(T) == 8 ? -1021.0 : -125.0);
}

struct NoMask {};
struct BooleanMask {};
template <typename Stored>
struct AdditiveMask {};

/// An element of storage type Stored, as T. Bf16 and Fp16 are stored in 16 bits.
template <typename Stored, typename T, typename Block>
TORCH_EXT_DEVICE T load_element(Block& block, const void* data, std::int64_t offset) {
  if constexpr (std::is_same_v<Stored, Bf16> || std::is_same_v<Stored, Fp16>) {
    return static_cast<T>(block.widen(Stored{}, static_cast<const std::uint16_t*>(data)[offset]));
  } else {
    return static_cast<T>(static_cast<const Stored*>(data)[offset]);
  }
}

/// Calls visit(mask type). Element: of query; an additive mask has its type or float.
template <typename Element, typename Visit>
TORCH_EXT_DEVICE void with_mask_type(const DeviceMasking& masking, Visit visit) {
  if (masking.kind == AttentionMaskKind::kNone) {
    visit(NoMask{});
  } else if (masking.kind == AttentionMaskKind::kBoolean) {
    visit(BooleanMask{});
  } else if (masking.mask_dtype == ScalarType::kFloat32) {
    visit(AdditiveMask<float>{});
  } else if constexpr (!std::is_same_v<Element, Tf32>) {  // float has no other
    visit(AdditiveMask<Element>{});
  }
}

/// The score with what a mask says of this pair, which lies within the shape and causality.
/// Offsets: of the mask's element, and of the key's padding byte (0 where there is no padding).
template <typename T, typename Block>
TORCH_EXT_DEVICE T padded_score(Block&, const DeviceMasking& masking, T score,
                                std::int64_t padding_offset) {
  if (masking.padding.data == nullptr) return score;
  const bool ignored = static_cast<const std::uint8_t*>(masking.padding.data)[padding_offset] != 0;
  return ignored ? -infinity<T>() : score;
}

template <typename T, typename Block>
TORCH_EXT_DEVICE T masked_score(Block&, const DeviceMasking&, NoMask, T score, std::int64_t) {
  return score;
}

template <typename T, typename Block>
TORCH_EXT_DEVICE T masked_score(Block&, const DeviceMasking& masking, BooleanMask, T score,
                                std::int64_t offset) {
  const bool attends = static_cast<const std::uint8_t*>(masking.mask.data)[offset] != 0;
  return attends ? score : -infinity<T>();
}

template <typename T, typename Stored, typename Block>
TORCH_EXT_DEVICE T masked_score(Block& block, const DeviceMasking& masking, AdditiveMask<Stored>,
                                T score, std::int64_t offset) {
  const T mask = load_element<Stored, T>(block, masking.mask.data, offset);
  const T added = score + mask;
  // Not max_of(): a NaN stays.
  return mask == -infinity<T>() ? mask : added < lowest_score<T>() ? lowest_score<T>() : added;
}

/// Offset of (batch, head)'s first entry.
TORCH_EXT_DEVICE std::int64_t map_start(const TileMap& map, const DeviceShape& shape,
                                        std::int64_t batch, std::int64_t head) {
  return map.bits == nullptr ? 0 : slice_start(map, shape, batch, head);
}

/// Bits of the tile of queries [first_query, last_query] of `heads` heads and keys
/// [first_key, last_key]; of a greater one where it does not lie on the map's grid.
template <typename Int>
TORCH_EXT_DEVICE std::uint32_t tile_bits(const TileMap& map, std::int64_t start, Int first_query,
                                         Int last_query, int heads, Int first_key, Int last_key) {
  if (map.bits == nullptr) return kSomeAttend;
  const Int first_row = map.row_stride == 0 ? 0 : first_query / kMapTile;
  const Int last_row = map.row_stride == 0 ? 0 : last_query / kMapTile;
  if (map.head_stride == 0) heads = 1;
  std::uint32_t bits = 0;
  for (int head = 0; head < heads; ++head) {
    for (Int row = first_row; row <= last_row; ++row) {
      const std::uint8_t* entries =
          map.bits + start + head * map.head_stride + row * map.row_stride;
      for (Int column = first_key / kMapTile; column <= last_key / kMapTile; ++column) {
        bits |= entries[column];
      }
    }
  }
  return bits;
}

}  // namespace torch_ext::cuda
