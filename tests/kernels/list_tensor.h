// A tensor of a list, of any dtype, strides and alignment, in guarded memory, read and written as
// doubles; and what tests of list kernels do to all of a list's tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/accumulation_params.h"

namespace torch_ext::testing {

inline constexpr ScalarType kListDtypes[] = {ScalarType::kFloat32, ScalarType::kFloat64,
                                             ScalarType::kBFloat16, ScalarType::kFloat16};

const char* dtype_name(ScalarType type);

/// How a tensor lies in memory.
struct ListPlace {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;  // in elements; empty: dense, row-major
  GuardSide side = GuardSide::kBack;
  std::int64_t shift = 0;  // bytes between the guard and the tensor
};

class ListTensor {
 public:
  /// No tensor: null operands.
  ListTensor() = default;
  ListTensor(ScalarType type, const ListPlace& place);
  ListTensor(ScalarType type, std::int64_t count, GuardSide side = GuardSide::kBack,
             std::int64_t shift = 0)
      : ListTensor(type, ListPlace{{count}, {}, side, shift}) {}

  explicit operator bool() const { return storage_ != nullptr; }
  ScalarType type() const { return type_; }
  std::int64_t count() const { return count_; }
  const std::vector<std::int64_t>& sizes() const { return sizes_; }
  const std::vector<std::int64_t>& strides() const { return strides_; }
  Operand operand() const { return {data_, type_}; }
  ConstOperand const_operand() const { return {data_, type_}; }

  /// `index` is row-major over the sizes.
  double get(std::int64_t index) const;
  void set(std::int64_t index, double value) const;

  /// Nonzero numbers that differ from element to element and from seed to seed, in +-[1/4, 2).
  void fill(std::uint64_t seed) const;
  void fill(const std::function<double(std::int64_t)>& value) const;

  /// The same tensor in memory of its own, laid out the same.
  ListTensor copy() const;

  /// The bytes that belong to its elements, in order.
  std::vector<std::uint8_t> bytes() const;

  /// Whether everything around and between the elements is still what fresh memory holds.
  bool gaps_intact() const;

 private:
  std::int64_t offset(std::int64_t index) const;

  ScalarType type_ = ScalarType::kFloat32;
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> strides_;
  ListPlace place_;
  std::int64_t count_ = 0;
  std::shared_ptr<GuardedBuffer> storage_;
  char* data_ = nullptr;
};

/// What a StridedLoop over several tensors of one shape points to. Absent tensors have strides too.
class LoopNumbers {
 public:
  LoopNumbers() = default;
  explicit LoopNumbers(std::initializer_list<const ListTensor*> operands);
  StridedLoop loop() const;

 private:
  std::vector<std::int64_t> sizes_;
  std::vector<std::int64_t> strides_;
};

/// What is allowed between a kernel's number and the reference's: one unit in the last place of the
/// dtype it is stored in, and roundings of the type it was computed in, of numbers of the order of
/// `magnitude`.
struct ListTolerance {
  bool is_double = false;
  double magnitude = 1.0;
};

/// Reports the first element that differs by more.
void expect_close(const ListTensor& actual, const ListTensor& expected,
                  const ListTolerance& tolerance, const std::string& what);

/// Parameters as an optimizer leaves them: their masters' rounding. Every seventh is another
/// number, which somebody has written since.
void round_masters(const ListTensor& param, const ListTensor& master);

/// A number in +-[1/4, 2) for each (seed, index).
double varied_number(std::uint64_t seed, std::int64_t index);

}  // namespace torch_ext::testing
