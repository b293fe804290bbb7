// torch_ext::pack_sequences. On the host: the lengths of a data set are numbers of its index.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../../kernels/cpu/sequence_packing.h"

namespace torch_ext {
namespace {

constexpr const char* kPack = "torch_ext::pack_sequences: ";

at::Tensor checked_lengths(const at::Tensor& lengths, std::int64_t capacity) {
  TORCH_CHECK(at::isIntegralType(lengths.scalar_type(), /*includeBool=*/false), kPack,
              "lengths takes integers, got ", lengths.scalar_type());
  TORCH_CHECK(lengths.dim() == 1, kPack, "lengths takes one dimension, got sizes ",
              lengths.sizes());
  at::Tensor checked = lengths.to(at::kLong).contiguous();
  const std::int64_t* const data = checked.const_data_ptr<std::int64_t>();
  const std::int64_t* const end = data + checked.numel();
  const std::int64_t* const bad =
      std::find_if(data, end, [&](std::int64_t length) { return length < 0 || length > capacity; });
  TORCH_CHECK(bad == end, kPack, "lengths takes numbers from 0 to capacity, ", capacity, ", got ",
              *bad, " at ", bad - data);
  return checked;
}

at::Tensor tensor_of(const std::vector<std::int64_t>& numbers) {
  at::Tensor tensor = at::empty({static_cast<std::int64_t>(numbers.size())}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<std::int64_t>());
  return tensor;
}

std::tuple<at::Tensor, at::Tensor> pack_sequences(const at::Tensor& lengths, std::int64_t capacity,
                                                  std::optional<std::int64_t> max_sequences) {
  TORCH_CHECK(capacity >= 1, kPack, "capacity takes a number >= 1, got ", capacity);
  TORCH_CHECK(max_sequences.value_or(1) >= 1, kPack,
              "max_sequences takes a number >= 1 or none, got ", max_sequences.value_or(1));
  const at::Tensor checked = checked_lengths(lengths, capacity);
  const Packs packs = pack_best_fit_decreasing({.lengths = checked.const_data_ptr<std::int64_t>(),
                                                .count = checked.numel(),
                                                .capacity = capacity,
                                                .max_sequences = max_sequences.value_or(0)});
  return {tensor_of(packs.indices), tensor_of(packs.offsets)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  // As many offsets as the lengths' values say: no shapes without values, so no Meta kernel.
  m.def(
      "pack_sequences(Tensor lengths, int capacity, *, int? max_sequences=None) -> (Tensor "
      "indices, "
      "Tensor offsets)",
      {at::Tag::dynamic_output_shape, at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("pack_sequences", &pack_sequences); }

}  // namespace torch_ext
