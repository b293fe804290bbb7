#include "list_tensor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/reference/element_access.h"

namespace torch_ext::testing {
namespace {

std::vector<std::int64_t> dense_strides(const std::vector<std::int64_t>& sizes) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t dim = sizes.size(); dim-- > 1;) {
    strides[dim - 1] = strides[dim] * std::max<std::int64_t>(sizes[dim], 1);
  }
  return strides;
}

double unit_in_last_place(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
      return 0x1p-52;
    case ScalarType::kBFloat16:
      return 0x1p-7;
    case ScalarType::kFloat16:
      return 0x1p-10;
    default:
      return 0x1p-23;
  }
}

}  // namespace

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return "fp32";
    case ScalarType::kFloat64:
      return "fp64";
    case ScalarType::kBFloat16:
      return "bf16";
    case ScalarType::kFloat16:
      return "fp16";
    case ScalarType::kBool:
      break;
  }
  return "bool";
}

double varied_number(std::uint64_t seed, std::int64_t index) {
  // splitmix64
  std::uint64_t x = seed * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(index) + 1;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  const double magnitude = 0.25 + 1.75 * static_cast<double>(x >> 12) * 0x1p-52;
  return (x & 1) != 0 ? magnitude : -magnitude;
}

ListTensor::ListTensor(ScalarType type, const ListPlace& place)
    : type_(type), sizes_(place.sizes), strides_(place.strides), place_(place), count_(1) {
  if (strides_.empty()) strides_ = dense_strides(sizes_);
  std::int64_t last = 0;
  for (std::size_t dim = 0; dim < sizes_.size(); ++dim) {
    count_ *= sizes_[dim];
    last += (sizes_[dim] - 1) * strides_[dim];
  }
  const std::int64_t width = static_cast<std::int64_t>(element_size(type));
  const std::int64_t used = count_ == 0 ? 0 : (last + 1) * width;
  storage_ =
      std::make_shared<GuardedBuffer>(static_cast<std::size_t>(used + place.shift), place.side);
  data_ = static_cast<char*>(storage_->data());
  if (place.side == GuardSide::kFront) data_ += place.shift;
}

std::int64_t ListTensor::offset(std::int64_t index) const {
  std::int64_t offset = 0;
  for (std::size_t dim = sizes_.size(); dim-- > 0;) {
    offset += index % sizes_[dim] * strides_[dim];
    index /= sizes_[dim];
  }
  return offset;
}

double ListTensor::get(std::int64_t index) const {
  return reference::load_element(data_, offset(index), type_);
}

void ListTensor::set(std::int64_t index, double value) const {
  reference::store_element(data_, offset(index), type_, value);
}

void ListTensor::fill(std::uint64_t seed) const {
  fill([seed](std::int64_t index) { return varied_number(seed, index); });
}

void ListTensor::fill(const std::function<double(std::int64_t)>& value) const {
  for (std::int64_t index = 0; index < count_; ++index) set(index, value(index));
}

void round_masters(const ListTensor& param, const ListTensor& master) {
  for (std::int64_t i = 0; i < param.count(); ++i) {
    if (i % 7 != 0) param.set(i, master.get(i));
  }
}

ListTensor ListTensor::copy() const {
  if (storage_ == nullptr) return {};
  ListTensor other(type_, place_);
  std::memcpy(other.storage_->data(), storage_->data(), storage_->size());
  return other;
}

std::vector<std::uint8_t> ListTensor::bytes() const {
  std::vector<std::uint8_t> result;
  const std::size_t width = element_size(type_);
  result.reserve(static_cast<std::size_t>(count_) * width);
  for (std::int64_t index = 0; index < count_; ++index) {
    const auto* element = reinterpret_cast<const std::uint8_t*>(data_) +
                          static_cast<std::size_t>(offset(index)) * width;
    result.insert(result.end(), element, element + width);
  }
  return result;
}

bool ListTensor::gaps_intact() const {
  if (storage_ == nullptr) return true;
  if (!storage_->surroundings_intact()) return false;
  const std::size_t width = element_size(type_);
  const auto* begin = static_cast<const std::uint8_t*>(storage_->data());
  const std::size_t start =
      static_cast<std::size_t>(reinterpret_cast<const std::uint8_t*>(data_) - begin);
  std::vector<bool> owned(storage_->size());
  for (std::int64_t index = 0; index < count_; ++index) {
    const std::size_t first = start + static_cast<std::size_t>(offset(index)) * width;
    for (std::size_t byte = 0; byte < width; ++byte) owned[first + byte] = true;
  }
  for (std::size_t byte = 0; byte < owned.size(); ++byte) {
    if (!owned[byte] && begin[byte] != GuardedBuffer::kPoison) return false;
  }
  return true;
}

LoopNumbers::LoopNumbers(std::initializer_list<const ListTensor*> operands)
    : sizes_((*operands.begin())->sizes()) {
  for (const ListTensor* operand : operands) {
    if (*operand) {
      strides_.insert(strides_.end(), operand->strides().begin(), operand->strides().end());
    } else {
      strides_.insert(strides_.end(), sizes_.size(), std::int64_t{1} << 40);
    }
  }
}

StridedLoop LoopNumbers::loop() const {
  if (sizes_.empty()) return {};
  return {static_cast<std::int32_t>(sizes_.size()), sizes_.data(), strides_.data()};
}

void expect_close(const ListTensor& actual, const ListTensor& expected,
                  const ListTolerance& tolerance, const std::string& what) {
  ASSERT_EQ(actual.count(), expected.count()) << what;
  EXPECT_TRUE(actual.gaps_intact()) << what << ": something beside its elements was written";
  const double unit = unit_in_last_place(expected.type());
  const double smallest = expected.type() == ScalarType::kFloat16 ? 0x1p-24 : 0.0;
  const double compute = tolerance.magnitude * (tolerance.is_double ? 0x1p-50 : 0x1p-21);
  for (std::int64_t index = 0; index < expected.count(); ++index) {
    const double got = actual.get(index);
    const double wanted = expected.get(index);
    const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
    const double rounding = std::max(unit * std::fabs(wanted), smallest);
    if (same || std::fabs(got - wanted) <= rounding + compute) continue;
    ADD_FAILURE() << what << ", " << dtype_name(expected.type()) << " element " << index << " of "
                  << expected.count() << ": " << got << " instead of " << wanted;
    return;
  }
}

}  // namespace torch_ext::testing
