// Which keys a query attends to by position, and which queries attend to a key: the one place that
// knows, on the host and on devices. Sums are exact or end at the end of int64: any window will do.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCH_EXT_EXTENT constexpr __host__ __device__ __forceinline__
#else
// Inlined everywhere, as strided_view.h's functions are.
#define TORCH_EXT_EXTENT constexpr inline __attribute__((always_inline))
#endif

namespace torch_ext {

inline constexpr std::int64_t kUnbounded = INT64_MAX;

/// Query i attends to keys i + offset - left <= j <= i + offset + right. An offset of 0 puts the
/// diagonal at the top left, kv_len - q_len at the lower right. Causal: right = 0.
struct KeyWindow {
  std::int64_t left = kUnbounded;   // at least 0
  std::int64_t right = kUnbounded;  // at least 0
  std::int64_t offset = 0;

  TORCH_EXT_EXTENT bool bounds_left() const { return left != kUnbounded; }
  TORCH_EXT_EXTENT bool bounds_right() const { return right != kUnbounded; }
  TORCH_EXT_EXTENT bool bounds_keys() const { return bounds_left() || bounds_right(); }
};

/// Positions begin <= i < end.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  TORCH_EXT_EXTENT bool empty() const { return begin >= end; }
  TORCH_EXT_EXTENT std::int64_t size() const { return empty() ? 0 : end - begin; }
  TORCH_EXT_EXTENT bool contains(std::int64_t i) const { return i >= begin && i < end; }
};

/// Of the pairs of a tile, how many take part.
enum class TileClass : std::uint8_t { kEmpty = 0, kFull = 1, kMixed = 2 };

namespace extent {

TORCH_EXT_EXTENT std::int64_t saturating_add(std::int64_t a, std::int64_t b) {
  if (b > 0 && a > INT64_MAX - b) return INT64_MAX;
  if (b < 0 && a < INT64_MIN - b) return INT64_MIN;
  return a + b;
}

TORCH_EXT_EXTENT std::int64_t saturating_subtract(std::int64_t a, std::int64_t b) {
  if (b < 0 && a > INT64_MAX + b) return INT64_MAX;
  if (b > 0 && a < INT64_MIN + b) return INT64_MIN;
  return a - b;
}

TORCH_EXT_EXTENT std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// The order of each sum leaves at most its last step to saturate, or terms of one sign only.
TORCH_EXT_EXTENT std::int64_t first_key(const KeyWindow& window, std::int64_t query) {
  return window.bounds_left() ? saturating_add(query - window.left, window.offset) : INT64_MIN;
}

TORCH_EXT_EXTENT std::int64_t key_end(const KeyWindow& window, std::int64_t query) {
  if (!window.bounds_right()) return INT64_MAX;
  return saturating_add(saturating_add(saturating_add(window.offset, window.right), query), 1);
}

TORCH_EXT_EXTENT std::int64_t first_query(const KeyWindow& window, std::int64_t key) {
  return window.bounds_right() ? saturating_subtract(key - window.right, window.offset) : INT64_MIN;
}

TORCH_EXT_EXTENT std::int64_t query_end(const KeyWindow& window, std::int64_t key) {
  if (!window.bounds_left()) return INT64_MAX;
  return saturating_add(saturating_add(saturating_subtract(window.left, window.offset), key), 1);
}

TORCH_EXT_EXTENT Range clamped(std::int64_t begin, std::int64_t end, std::int64_t len) {
  const Range range{clamp(begin, 0, len), clamp(end, 0, len)};
  return {range.begin, range.end < range.begin ? range.begin : range.end};
}

}  // namespace extent

/// The keys of one query, of kv_len keys.
TORCH_EXT_EXTENT Range keys_of(const KeyWindow& window, std::int64_t query, std::int64_t kv_len) {
  return extent::clamped(extent::first_key(window, query), extent::key_end(window, query), kv_len);
}

/// The keys that any of the queries, at least one, attends to: they follow each other.
TORCH_EXT_EXTENT Range keys_of_any(const KeyWindow& window, Range queries, std::int64_t kv_len) {
  return extent::clamped(extent::first_key(window, queries.begin),
                         extent::key_end(window, queries.end - 1), kv_len);
}

/// The keys that every one of the queries, at least one, attends to.
TORCH_EXT_EXTENT Range keys_of_all(const KeyWindow& window, Range queries, std::int64_t kv_len) {
  return extent::clamped(extent::first_key(window, queries.end - 1),
                         extent::key_end(window, queries.begin), kv_len);
}

/// The queries, of q_len, that attend to any of the keys, at least one.
TORCH_EXT_EXTENT Range queries_of_any(const KeyWindow& window, Range keys, std::int64_t q_len) {
  return extent::clamped(extent::first_query(window, keys.begin),
                         extent::query_end(window, keys.end - 1), q_len);
}

/// The queries, of q_len, that attend to every one of the keys, at least one.
TORCH_EXT_EXTENT Range queries_of_all(const KeyWindow& window, Range keys, std::int64_t q_len) {
  return extent::clamped(extent::first_query(window, keys.end - 1),
                         extent::query_end(window, keys.begin), q_len);
}

/// Of the pairs of queries and keys, at least one of each.
TORCH_EXT_EXTENT TileClass tile_class(const KeyWindow& window, Range queries, Range keys) {
  const Range all = keys_of_all(window, queries, keys.end);
  if (all.begin <= keys.begin && all.end >= keys.end) return TileClass::kFull;
  const Range any = keys_of_any(window, queries, keys.end);
  return any.end > keys.begin && !any.empty() ? TileClass::kMixed : TileClass::kEmpty;
}

}  // namespace torch_ext
