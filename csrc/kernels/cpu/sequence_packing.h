// Sequences into packs of one capacity: best fit decreasing.
#pragma once

#include <cstdint>
#include <vector>

namespace torch_ext {

struct PackingParams {
  const std::int64_t* lengths = nullptr;  // (count), each from 0 to capacity
  std::int64_t count = 0;
  std::int64_t capacity = 1;
  std::int64_t max_sequences = 0;  // in one pack; 0: any number
};

/// Pack k has the sequences indices[offsets[k]] to indices[offsets[k + 1] - 1].
struct Packs {
  std::vector<std::int64_t> indices;
  std::vector<std::int64_t> offsets;
};

/// The longest sequence first, each into the pack with the least room that still takes it: within
/// 11 / 9 of the fewest packs possible. O(count log count); the same packs for the same lengths.
Packs pack_best_fit_decreasing(const PackingParams& params);

}  // namespace torch_ext
