// torch_ext::append_kv_: new rows of keys and values into the pages of a cache, in place.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../attention/attention_checks.h"
#include "../attention/plain_dispatch.h"
#include "../attention/symbolic_sizes.h"
#include "../tensor_storage.h"
#include "cache_checks.h"

namespace torch_ext {
namespace {

constexpr const char* kOp = "append_kv_";

void check_rows(const char* name, const at::Tensor& rows, const at::Tensor& cache,
                const char* cache_name) {
  check_tensor_kind(kOp, name, rows);
  TORCH_CHECK(rows.dim() == 3 && equal(rows.sym_size(1), cache.sym_size(2)) &&
                  equal(rows.sym_size(2), cache.sym_size(3)),
              "torch_ext::", kOp, ": ", name, " takes the shape (rows, kv_heads, dim) of ",
              cache_name, "'s heads, (rows, ", cache.sym_size(2), ", ", cache.sym_size(3),
              "), got ", rows.sym_sizes());
  TORCH_CHECK(rows.device() == cache.device(), "torch_ext::", kOp, ": ", name,
              " takes the device of ", cache_name, ", ", cache.device(), ", got ", rows.device());
}

void check_append(const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& key,
                  const at::Tensor& value, const at::Tensor& slot_mapping,
                  const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check_caches(kOp, {"key_cache", "value_cache"}, key_cache, value_cache, key.scalar_type(),
               k_scale, v_scale);
  check_rows("key", key, key_cache, "key_cache");
  check_rows("value", value, value_cache, "value_cache");
  TORCH_CHECK(value.scalar_type() == key.scalar_type(), "torch_ext::", kOp,
              ": value takes the dtype of key, ", key.scalar_type(), ", got ", value.scalar_type());
  TORCH_CHECK(equal(value.sym_size(0), key.sym_size(0)), "torch_ext::", kOp,
              ": value takes the rows of key, ", key.sym_size(0), ", got ", value.sym_size(0));
  TORCH_CHECK(
      slot_mapping.layout() == at::kStrided && slot_mapping.dim() == 1 &&
          (slot_mapping.scalar_type() == at::kInt || slot_mapping.scalar_type() == at::kLong) &&
          equal(slot_mapping.sym_size(0), key.sym_size(0)),
      "torch_ext::", kOp, ": slot_mapping takes a dense Int or Long tensor with an element for ",
      "each of ", key.sym_size(0), " rows, got ", slot_mapping.scalar_type(), " of shape ",
      slot_mapping.sym_sizes());
  TORCH_CHECK(slot_mapping.device() == key_cache.device(), "torch_ext::", kOp,
              ": slot_mapping takes the device of key_cache, ", key_cache.device(), ", got ",
              slot_mapping.device());
  check_readable(kOp, "slot_mapping", slot_mapping);
}

std::vector<std::int64_t> checked_slots(const at::Tensor& slot_mapping, std::int64_t slots) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(slot_mapping.size(0)));
  const std::int64_t stride = slot_mapping.stride(0);
  for (std::size_t i = 0; i < result.size(); ++i) {
    const std::int64_t offset = static_cast<std::int64_t>(i) * stride;
    result[i] = slot_mapping.scalar_type() == at::kInt
                    ? slot_mapping.const_data_ptr<std::int32_t>()[offset]
                    : slot_mapping.const_data_ptr<std::int64_t>()[offset];
    TORCH_CHECK(result[i] < slots, "torch_ext::", kOp, ": slot_mapping takes slots below ", slots,
                ", page * page_size + row, or negative ones for rows to skip, got ", result[i],
                " at position ", i);
  }
  return result;
}

// Rounded to nearest, ties to even; out of range: the nearest end.
void quantize(float x, std::int8_t& stored) {
  stored = static_cast<std::int8_t>(std::nearbyint(std::clamp(x, -128.0f, 127.0f)));
}
void quantize(float x, c10::Float8_e4m3fn& stored) {
  constexpr float kLargest = 448.0f;
  stored = c10::Float8_e4m3fn(std::isnan(x) ? x : std::clamp(x, -kLargest, kLargest));
}

/// One tensor's rows and where they go. Heads are shared out among threads, rows follow each other:
/// where two rows have one slot, the later one stays.
class Append {
 public:
  Append(const at::Tensor& cache, const at::Tensor& rows, const std::vector<std::int64_t>& slots)
      : cache_(cache), rows_(rows), slots_(slots) {}

  void copy() const {
    const std::int64_t size = static_cast<std::int64_t>(rows_.element_size());
    const std::int64_t columns = rows_.size(2);
    const bool dense = (columns <= 1) || (rows_.stride(2) == 1 && cache_.stride(3) == 1);
    const char* source = static_cast<const char*>(rows_.const_data_ptr());
    char* target = static_cast<char*>(cache_.mutable_data_ptr());
    for_rows([&](std::int64_t from, std::int64_t to) {
      if (dense) {
        std::memcpy(target + to * size, source + from * size,
                    static_cast<std::size_t>(columns * size));
        return;
      }
      for (std::int64_t c = 0; c < columns; ++c) {
        std::memcpy(target + (to + c * cache_.stride(3)) * size,
                    source + (from + c * rows_.stride(2)) * size, static_cast<std::size_t>(size));
      }
    });
  }

  /// `scale`: () or (kv_heads).
  template <typename Stored, typename Element>
  void quantize_rows(const at::Tensor& scale) const {
    const float* scales = scale.const_data_ptr<float>();
    const std::int64_t scale_stride = scale.dim() == 0 ? 0 : scale.stride(0);
    const Element* source = rows_.const_data_ptr<Element>();
    Stored* target = static_cast<Stored*>(cache_.mutable_data_ptr());
    const std::int64_t columns = rows_.size(2);
    for_heads([&](std::int64_t head, std::int64_t from, std::int64_t to) {
      const float divisor = scales[head * scale_stride];
      for (std::int64_t c = 0; c < columns; ++c) {
        const float x = static_cast<float>(source[from + c * rows_.stride(2)]);
        quantize(x / divisor, target[to + c * cache_.stride(3)]);
      }
    });
  }

 private:
  // body(head, offset in rows, offset in cache)
  template <typename Body>
  void for_heads(const Body& body) const {
    const std::int64_t page_size = cache_.size(1);
    const std::int64_t columns = std::max<std::int64_t>(rows_.size(2) * rows_.size(0), 1);
    constexpr std::int64_t kElementsPerThread = 1 << 15;  // as torch's own loops
    const std::int64_t grain = std::max<std::int64_t>(kElementsPerThread / columns, 1);
    at::parallel_for(0, rows_.size(1), grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::size_t row = 0; row < slots_.size(); ++row) {
        const std::int64_t slot = slots_[row];
        if (slot < 0) continue;
        const std::int64_t from = static_cast<std::int64_t>(row) * rows_.stride(0);
        const std::int64_t to =
            slot / page_size * cache_.stride(0) + slot % page_size * cache_.stride(1);
        for (std::int64_t head = begin; head < end; ++head) {
          body(head, from + head * rows_.stride(1), to + head * cache_.stride(2));
        }
      }
    });
  }
  template <typename Body>
  void for_rows(const Body& body) const {
    for_heads([&body](std::int64_t, std::int64_t from, std::int64_t to) { body(from, to); });
  }

  const at::Tensor& cache_;
  const at::Tensor& rows_;
  const std::vector<std::int64_t>& slots_;
};

template <typename Stored>
void quantize_rows(const Append& append, at::ScalarType type, const at::Tensor& scale) {
  switch (type) {
    case at::kDouble:
      return append.quantize_rows<Stored, double>(scale);
    case at::kBFloat16:
      return append.quantize_rows<Stored, c10::BFloat16>(scale);
    case at::kHalf:
      return append.quantize_rows<Stored, c10::Half>(scale);
    default:
      return append.quantize_rows<Stored, float>(scale);
  }
}

void append_rows(const at::Tensor& cache, const at::Tensor& rows,
                 const std::vector<std::int64_t>& slots, const OptionalTensor& scale) {
  const Append append(cache, rows, slots);
  if (cache.scalar_type() == at::kChar) {
    quantize_rows<std::int8_t>(append, rows.scalar_type(), *scale);
  } else if (cache.scalar_type() == at::kFloat8_e4m3fn) {
    quantize_rows<c10::Float8_e4m3fn>(append, rows.scalar_type(), *scale);
  } else {
    append.copy();
  }
}

void append_kv_cpu(const at::Tensor& key_cache, const at::Tensor& value_cache,
                   const at::Tensor& key, const at::Tensor& value, const at::Tensor& slot_mapping,
                   const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check_append(key_cache, value_cache, key, value, slot_mapping, k_scale, v_scale);
  const std::vector<std::int64_t> slots =
      checked_slots(slot_mapping, key_cache.size(0) * key_cache.size(1));
  append_rows(key_cache, key, slots, k_scale);
  append_rows(value_cache, value, slots, v_scale);
}

void append_kv_meta(const at::Tensor& key_cache, const at::Tensor& value_cache,
                    const at::Tensor& key, const at::Tensor& value, const at::Tensor& slot_mapping,
                    const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  check_append(key_cache, value_cache, key, value, slot_mapping, k_scale, v_scale);
}

using Operator = c10::TypedOperatorHandle<decltype(append_kv_cpu)>;

Operator append_operator() {
  static const Operator op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("torch_ext::append_kv_", "")
                                 .typed<decltype(append_kv_cpu)>();
  return op;
}

// As torch's own in-place operators: no graph is recorded through a write, versions move.
void append_kv_autograd(c10::DispatchKeySet keys, const at::Tensor& key_cache,
                        const at::Tensor& value_cache, const at::Tensor& key,
                        const at::Tensor& value, const at::Tensor& slot_mapping,
                        const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  TORCH_CHECK(!needs_gradient({&key_cache, &value_cache, &key, &value}), "torch_ext::", kOp,
              ": takes tensors that do not require grad while grad mode is on, got one that does: "
              "a cache is for inference; detach it, or call under torch.no_grad()");
  const at::AutoDispatchBelowAutograd guard;
  append_operator().redispatch(keys & c10::after_autograd_keyset, key_cache, value_cache, key,
                               value, slot_mapping, k_scale, v_scale);
}

void append_kv_in_place(c10::DispatchKeySet keys, const at::Tensor& key_cache,
                        const at::Tensor& value_cache, const at::Tensor& key,
                        const at::Tensor& value, const at::Tensor& slot_mapping,
                        const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    append_operator().redispatch(keys & c10::after_ADInplaceOrView_keyset, key_cache, value_cache,
                                 key, value, slot_mapping, k_scale, v_scale);
  }
  for (const at::Tensor* cache : {&key_cache, &value_cache}) {
    if (!cache->is_inference()) cache->unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  // slot_mapping: page * page_size + row of each row; negative: skipped.
  m.def(
      "append_kv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
      "Tensor slot_mapping, *, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) { m.impl("append_kv_", TORCH_FN(append_kv_cpu)); }
TORCH_LIBRARY_IMPL(torch_ext, Meta, m) { m.impl("append_kv_", TORCH_FN(append_kv_meta)); }
TORCH_LIBRARY_IMPL(torch_ext, Autograd, m) { m.impl("append_kv_", TORCH_FN(append_kv_autograd)); }
TORCH_LIBRARY_IMPL(torch_ext, ADInplaceOrView, m) {
  m.impl("append_kv_", TORCH_FN(append_kv_in_place));
}

}  // namespace torch_ext
