#include "cache_checks.h"

#include <c10/util/Exception.h>

#include "../attention/symbolic_sizes.h"
#include "../tensor_storage.h"

namespace torch_ext {
namespace {

void check_cache(const char* op, const char* name, const at::Tensor& cache, at::ScalarType dtype) {
  TORCH_CHECK(cache.defined() && !cache.is_nested() && cache.layout() == at::kStrided,
              "torch_ext::", op, ": ", name,
              " takes a dense tensor; nested and sparse ones are not supported");
  TORCH_CHECK(cache.dim() == 4, "torch_ext::", op, ": ", name,
              " takes 4 dimensions, (pages, page_size, kv_heads, dim), got ", cache.dim(), " (",
              cache.sym_sizes(), ")");
  TORCH_CHECK(cache.scalar_type() == dtype || is_quantized_cache(cache.scalar_type()),
              "torch_ext::", op, ": ", name, " takes ", dtype, ", Char or Float8_e4m3fn, got ",
              cache.scalar_type());
  TORCH_CHECK(!is_zero(cache.sym_size(1)), "torch_ext::", op, ": ", name,
              " takes pages of at least one row, got ", cache.sym_sizes());
  check_readable(op, name, cache);
}

void check_scale(const char* op, const char* name, const OptionalTensor& scale,
                 const at::Tensor& cache) {
  const at::Tensor* tensor = given(scale);
  const bool wanted = is_quantized_cache(cache.scalar_type());
  TORCH_CHECK((tensor != nullptr) == wanted, "torch_ext::", op, ": ", name, " takes ",
              wanted ? "a Float tensor" : "None", " with a cache of ", cache.scalar_type(),
              ", got ", wanted ? "None" : "a tensor");
  if (!wanted) return;
  TORCH_CHECK(tensor->scalar_type() == at::kFloat && tensor->layout() == at::kStrided,
              "torch_ext::", op, ": ", name, " takes a dense Float tensor, got ",
              tensor->scalar_type());
  TORCH_CHECK(
      tensor->dim() == 0 || (tensor->dim() == 1 && equal(tensor->sym_size(0), cache.sym_size(2))),
      "torch_ext::", op, ": ", name, " takes the shape () or (kv_heads), (", cache.sym_size(2),
      "), got ", tensor->sym_sizes());
  TORCH_CHECK(tensor->device() == cache.device(), "torch_ext::", op, ": ", name,
              " takes the device of the cache, ", cache.device(), ", got ", tensor->device());
  check_readable(op, name, *tensor);
}

}  // namespace

void check_caches(const char* op, CacheNames names, const at::Tensor& key, const at::Tensor& value,
                  at::ScalarType dtype, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale) {
  check_cache(op, names.key, key, dtype);
  check_cache(op, names.value, value, dtype);
  TORCH_CHECK(value.scalar_type() == key.scalar_type() && value.device() == key.device(),
              "torch_ext::", op, ": ", names.value, " takes the dtype and device of ", names.key,
              ", ", key.scalar_type(), " on ", key.device(), ", got ", value.scalar_type(), " on ",
              value.device());
  bool same = true;
  for (const std::int64_t dim : {0, 1, 2})
    same = same && equal(value.sym_size(dim), key.sym_size(dim));
  TORCH_CHECK(same, "torch_ext::", op, ": ", names.value, " takes the pages and heads of ",
              names.key, ", ", key.sym_sizes().slice(0, 3), ", got ",
              value.sym_sizes().slice(0, 3));
  check_scale(op, "k_scale", k_scale, key);
  check_scale(op, "v_scale", v_scale, value);
}

}  // namespace torch_ext
