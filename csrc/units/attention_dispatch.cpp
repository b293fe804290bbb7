// The operators of attention: schemas, composites, vmap. One translation unit (csrc/README.md).
#include "ops/attention/attention_schema.cpp"
#include "ops/attention/attention_vmap.cpp"
#include "ops/attention/packed_attention.cpp"
#include "ops/attention/plain_dispatch.cpp"
#include "ops/attention/scaled_dot_product_attention_composite.cpp"
#include "ops/attention/seeded_attention.cpp"
#include "ops/attention/self_attention_composite.cpp"
#include "ops/attention/vmap_level.cpp"
