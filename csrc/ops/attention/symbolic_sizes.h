// Questions about sizes, asked alike of integers and of symbols. A symbol that is known answers as
// an integer would and leaves a guard; one that is not (data-dependent) becomes a check at run
// time.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>

namespace torch_ext {

template <typename Int>
c10::ArrayRef<Int> sizes_of(const at::Tensor& tensor);
template <>
inline c10::ArrayRef<std::int64_t> sizes_of(const at::Tensor& tensor) {
  return tensor.sizes();
}
template <>
inline c10::ArrayRef<c10::SymInt> sizes_of(const at::Tensor& tensor) {
  return tensor.sym_sizes();
}

template <typename Int>
c10::ArrayRef<Int> strides_of(const at::Tensor& tensor);
template <>
inline c10::ArrayRef<std::int64_t> strides_of(const at::Tensor& tensor) {
  return tensor.strides();
}
template <>
inline c10::ArrayRef<c10::SymInt> strides_of(const at::Tensor& tensor) {
  return tensor.sym_strides();
}

/// Whether a dimension broadcasts. Data-dependent sizes do not.
inline bool is_one(std::int64_t size) { return size == 1; }
inline bool is_one(const c10::SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(1)); }

inline bool is_zero(std::int64_t size) { return size == 0; }
inline bool is_zero(const c10::SymInt& size) { return TORCH_GUARD_OR_FALSE(size.sym_eq(0)); }

/// Whether two sizes are known to be the same.
inline bool same(std::int64_t a, std::int64_t b) { return a == b; }
inline bool same(const c10::SymInt& a, const c10::SymInt& b) {
  return TORCH_GUARD_OR_FALSE(a.sym_eq(b));
}

/// Whether two sizes have to be the same.
inline bool equal(std::int64_t a, std::int64_t b) { return a == b; }
inline bool equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

/// Whether a number has to be no less than another.
inline bool at_least(const c10::SymInt& number, std::int64_t least) {
  if (const auto known = number.maybe_as_int()) return *known >= least;
  return number.sym_ge(least).expect_true(__FILE__, __LINE__);
}

/// Whether `whole` has to be a multiple of `part`. Zero divides zero alone.
template <typename Int>
bool divides(const Int& part, const Int& whole) {
  return is_zero(part) ? equal(whole, Int(0)) : equal(whole % part, Int(0));
}

}  // namespace torch_ext
