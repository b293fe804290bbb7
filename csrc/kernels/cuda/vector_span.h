// How a run of elements that several operands share is cut for 16-byte accesses: single elements up
// to the first address at which every operand is aligned, vectors, single elements.
#pragma once

#include <cstdint>

#include "../strided_view.h"
#include "device_program.h"
#include "memory_vector.h"

namespace torch_ext::cuda {

struct VectorSpan {
  int head;     // elements in front of the vectors
  int vectors;  // of as many elements as was asked for
};

/// The elements to skip so that an operand at `data`, of elements of `bytes`, is aligned to
/// `vector_bytes`; -1: no whole number is.
TORCH_EXT_DEVICE int misaligned_elements(const void* data, int bytes, int vector_bytes) {
  const int behind = static_cast<int>(reinterpret_cast<std::uintptr_t>(data) %
                                      static_cast<std::uintptr_t>(vector_bytes));
  if (behind == 0) return 0;
  const int missing = vector_bytes - behind;
  return missing % bytes == 0 ? missing / bytes : -1;
}

/// `count` elements in vectors of `width`. Operands of 2, 4 or 8 bytes an element are aligned to
/// `width` of their elements. Where they are never aligned together there are no vectors, and all
/// is head.
template <int kOperands>
TORCH_EXT_DEVICE VectorSpan vector_span(const void* const (&data)[kOperands],
                                        const int (&bytes)[kOperands], int count, int width) {
  int head = -1;
  bool together = true;
  TORCH_EXT_UNROLL
  for (int k = 0; k < kOperands; ++k) {
    if (data[k] == nullptr) continue;
    const int own = misaligned_elements(data[k], bytes[k], width * bytes[k]);
    together = together && own >= 0 && (head < 0 || own == head);
    head = own;
  }
  if (!together || head < 0 || head >= count) return {count, 0};
  return {head, (count - head) / width};
}

}  // namespace torch_ext::cuda
