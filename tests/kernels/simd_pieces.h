// The building blocks of one instruction set's kernels behind plain functions, so that tests, which
// are full of standard templates, stay outside its `#pragma GCC target` region.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/strided_view.h"

namespace torch_ext::testing {

struct SimdPieces {
  int float_lanes;
  int double_lanes;
  int max_vectors;

  // One vector; `degree` of the polynomial: 3 or 5.
  void (*exp2_float)(int degree, const float* x, float* result);
  void (*exp2_double)(const double* x, double* result);
  void (*tanh_float)(const float* x, float* result);
  void (*tanh_double)(const double* x, double* result);

  // float_lanes elements.
  void (*bf16_to_float)(const std::uint16_t* bits, float* result);
  void (*float_to_bf16)(const float* x, std::uint16_t* bits);
  void (*fp16_to_float)(const std::uint16_t* bits, float* result);
  void (*float_to_fp16)(const float* x, std::uint16_t* bits);

  // Up to a vector of elements of any type and stride.
  void (*load_floats)(const void* source, ScalarType type, std::int64_t stride, std::int64_t count,
                      float* result);
  void (*load_doubles)(const void* source, ScalarType type, std::int64_t stride, std::int64_t count,
                       double* result);
  void (*store_floats)(void* target, ScalarType type, std::int64_t stride, std::int64_t count,
                       const float* x);
  void (*store_doubles)(void* target, std::int64_t stride, std::int64_t count, const double* x);

  // Blocks of lanes x lanes.
  void (*transpose_floats)(float* block);
  void (*transpose_doubles)(double* block);
  void (*reduce_rows)(float* block, float* result);

  // counter: 4 words x float_lanes.
  void (*philox)(std::uint32_t* counter, std::uint64_t seed);
  void (*dropout_bits_of_keys)(std::uint16_t* bits, std::int64_t bits_stride, std::int64_t queries,
                               std::int64_t keys, std::int64_t first_query, std::int64_t first_key,
                               std::uint32_t slice, std::uint64_t seed);

  // C (rows, vectors * lanes) (+)= A(i, k) = a[i * row_stride + k * depth_stride] times B.
  void (*contract_float)(bool accumulate, std::int64_t rows, std::int64_t vectors,
                         std::int64_t depth, const float* a, std::int64_t row_stride,
                         std::int64_t depth_stride, const float* b, std::int64_t b_stride, float* c,
                         std::int64_t c_stride);
  void (*contract_double)(bool accumulate, std::int64_t rows, std::int64_t vectors,
                          std::int64_t depth, const double* a, std::int64_t row_stride,
                          std::int64_t depth_stride, const double* b, std::int64_t b_stride,
                          double* c, std::int64_t c_stride);

  // Null where bf16 is not multiplied in pairs. Depth counts pairs.
  void (*contract_bf16_pairs)(bool accumulate, std::int64_t rows, std::int64_t vectors,
                              std::int64_t depth, const std::uint32_t* a, std::int64_t row_stride,
                              std::int64_t depth_stride, const std::uint32_t* b,
                              std::int64_t b_stride, float* c, std::int64_t c_stride);
  void (*pack_bf16_pairs)(const float* low, const float* high, std::uint32_t* pairs);
};

struct NamedSimdPieces {
  std::string name;
  const SimdPieces* pieces;
};

inline void PrintTo(const NamedSimdPieces& named, std::ostream* out) { *out << named.name; }

/// In the order of kernels_under_test().
std::vector<NamedSimdPieces> simd_pieces_under_test();

}  // namespace torch_ext::testing
