// One element of any type, written.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device_program.h"

namespace torch_ext::cuda {

/// Whether Element is one of the 16-bit types, which a Block converts.
template <typename Element>
inline constexpr bool kIsHalf = std::is_same_v<Element, Bf16> || std::is_same_v<Element, Fp16>;

template <typename Element, typename T, typename Block>
TORCH_EXT_DEVICE void store_element(Block& block, void* data, std::int64_t offset, T value) {
  if constexpr (kIsHalf<Element>) {
    static_cast<std::uint16_t*>(data)[offset] =
        static_cast<std::uint16_t>(block.pack(Element{}, static_cast<float>(value), 0.0f));
  } else if constexpr (std::is_same_v<Element, Tf32>) {
    static_cast<float*>(data)[offset] = static_cast<float>(value);
  } else {
    static_cast<Element*>(data)[offset] = static_cast<Element>(value);
  }
}

}  // namespace torch_ext::cuda
