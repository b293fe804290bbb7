// Where the vectors of a run of elements begin and end: all alignments of two and three operands.
#include <gtest/gtest.h>

#include <cstdint>

#include "kernels/cuda/vector_span.h"

namespace torch_ext::testing {
namespace {

const void* address(std::uintptr_t value) { return reinterpret_cast<const void*>(value); }

TEST(CudaVectorSpan, SkipsToTheFirstAlignedElement) {
  for (const int bytes : {1, 2, 4, 8}) {
    for (std::uintptr_t behind = 0; behind < 16; ++behind) {
      const int skipped = cuda::misaligned_elements(address(4096 + behind), bytes, 16);
      bool possible = false;
      for (int elements = 0; elements < 16 && !possible; ++elements) {
        if ((behind + static_cast<std::uintptr_t>(elements * bytes)) % 16 != 0) continue;
        possible = true;
        EXPECT_EQ(skipped, elements);
      }
      if (!possible) {
        EXPECT_EQ(skipped, -1);
      }
    }
  }
}

void check_span(const cuda::VectorSpan& span, int count, int width) {
  EXPECT_GE(span.head, 0);
  EXPECT_GE(span.vectors, 0);
  EXPECT_LE(span.head + span.vectors * width, count);
  if (span.vectors > 0) {
    EXPECT_LT(count - span.head - span.vectors * width, width);
  }
}

TEST(CudaVectorSpan, AlignsEveryOperandAtOnce) {
  int with_vectors = 0;
  for (const int first_bytes : {2, 4}) {
    for (const int second_bytes : {2, 4}) {
      const int width = 16 / (first_bytes > second_bytes ? first_bytes : second_bytes);
      for (int first = 0; first < 16; ++first) {
        for (int second = 0; second < 16; ++second) {
          for (const int count : {0, 1, 3, 7, 8, 9, 40, 16384}) {
            const std::uintptr_t addresses[2] = {
                4096 + static_cast<std::uintptr_t>(first * first_bytes),
                8192 + static_cast<std::uintptr_t>(second * second_bytes)};
            const void* const data[2] = {address(addresses[0]), address(addresses[1])};
            const int bytes[2] = {first_bytes, second_bytes};
            const cuda::VectorSpan span = cuda::vector_span(data, bytes, count, width);
            check_span(span, count, width);
            if (span.vectors == 0) {
              // Only where no head of up to a vector's length aligns both, or too little is left.
              for (int head = 0; head < width && head + width <= count; ++head) {
                const auto is_aligned = [&](int k) {
                  return (addresses[k] + static_cast<std::uintptr_t>(head * bytes[k])) %
                             static_cast<std::uintptr_t>(width * bytes[k]) ==
                         0;
                };
                EXPECT_FALSE(is_aligned(0) && is_aligned(1));
              }
              continue;
            }
            ++with_vectors;
            for (int k = 0; k < 2; ++k) {
              EXPECT_EQ((addresses[k] + static_cast<std::uintptr_t>(span.head * bytes[k])) %
                            static_cast<std::uintptr_t>(width * bytes[k]),
                        0u);
            }
          }
        }
      }
    }
  }
  EXPECT_GT(with_vectors, 100);
}

TEST(CudaVectorSpan, LeavesOutAbsentOperands) {
  const void* const data[3] = {address(4096 + 4), nullptr, address(8192 + 2)};
  const int bytes[3] = {4, 4, 2};
  const cuda::VectorSpan span = cuda::vector_span(data, bytes, 100, 4);
  EXPECT_EQ(span.head, 3);
  EXPECT_EQ(span.vectors, 24);
  const void* const none[3] = {nullptr, nullptr, nullptr};
  EXPECT_EQ(cuda::vector_span(none, bytes, 100, 4).vectors, 0);
}

}  // namespace
}  // namespace torch_ext::testing
