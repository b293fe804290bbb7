// What a cache of keys and values in pages may be: (pages, page_size, kv_heads, dim) of query's
// dtype, or int8 or float8_e4m3fn with scales.
#pragma once

#include <ATen/core/Tensor.h>

#include "../optional_tensor.h"

namespace torch_ext {

/// Whether elements are stored / scale.
inline bool is_quantized_cache(at::ScalarType type) {
  return type == at::kChar || type == at::kFloat8_e4m3fn;
}

struct CacheNames {
  const char* key;
  const char* value;
};

/// `dtype`: of query, or of the rows that are appended.
void check_caches(const char* op, CacheNames names, const at::Tensor& key, const at::Tensor& value,
                  at::ScalarType dtype, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale);

}  // namespace torch_ext
