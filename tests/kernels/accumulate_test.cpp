// accumulator = beta * accumulator + scale * grad on every instruction set against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cpu/list_schedule.h"
#include "kernels/reference/accumulation_reference.h"
#include "kernels_under_test.h"
#include "list_tensor.h"
#include "thread_task_runner.h"

namespace torch_ext::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A list of (accumulator, grad) pairs.
class AccumulateList {
 public:
  /// Both filled, but the accumulator not where `writes_only`: it then holds NaN.
  void add(ListTensor accumulator, ListTensor grad, bool strided = false,
           bool writes_only = false) {
    const std::uint64_t seed = 2 * pairs_.size();
    if (!writes_only) accumulator.fill(seed);
    grad.fill(seed + 1);
    pairs_.push_back({std::move(accumulator), std::move(grad), nullptr});
    Pair& pair = pairs_.back();
    if (strided) {
      pair.loop = std::make_shared<LoopNumbers>(
          std::initializer_list<const ListTensor*>{&pair.accumulator, &pair.grad});
    }
  }

  std::size_t size() const { return pairs_.size(); }
  const ListTensor& accumulator(std::size_t index) const { return pairs_[index].accumulator; }
  const ListTensor& grad(std::size_t index) const { return pairs_[index].grad; }

  /// With accumulators of its own.
  AccumulateList copy() const {
    AccumulateList other;
    for (const Pair& pair : pairs_) {
      other.pairs_.push_back({pair.accumulator.copy(), pair.grad, pair.loop});
    }
    return other;
  }

  AccumulateParams params(double beta, const ConstOperand& scale = {}) {
    entries_.clear();
    for (const Pair& pair : pairs_) {
      entries_.push_back({.count = pair.accumulator.count(),
                          .accumulator = pair.accumulator.operand(),
                          .grad = pair.grad.const_operand(),
                          .loop = pair.loop == nullptr ? StridedLoop{} : pair.loop->loop()});
    }
    return {.entries = entries_.data(),
            .num_entries = static_cast<std::int64_t>(entries_.size()),
            .beta = beta,
            .scale = scale};
  }

  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all;
    for (const Pair& pair : pairs_) {
      const std::vector<std::uint8_t> own = pair.accumulator.bytes();
      all.insert(all.end(), own.begin(), own.end());
    }
    return all;
  }

 private:
  struct Pair {
    ListTensor accumulator;
    ListTensor grad;
    std::shared_ptr<LoopNumbers> loop;
  };
  std::vector<Pair> pairs_;
  std::vector<AccumulateEntry> entries_;
};

class Accumulate : public KernelTest {
 protected:
  void check(const AccumulateList& list, double beta, const ListTensor& scale = {},
             const TaskRunner& runner = SerialTaskRunner()) const {
    AccumulateList actual = list.copy();
    AccumulateList expected = list.copy();
    const ConstOperand operand = scale ? scale.const_operand() : ConstOperand{};
    kernel().accumulate(actual.params(beta, operand), runner);
    accumulate_reference(expected.params(beta, operand));
    for (std::size_t i = 0; i < list.size(); ++i) {
      const ScalarType type = list.accumulator(i).type();
      const ScalarType grad_type = list.grad(i).type();
      const bool is_double = type == ScalarType::kFloat64 || grad_type == ScalarType::kFloat64;
      expect_close(actual.accumulator(i), expected.accumulator(i), {is_double, 4.0},
                   "entry " + std::to_string(i) + " += " + dtype_name(grad_type));
    }
  }
};

ListTensor scalar(ScalarType type, double value) {
  ListTensor tensor(type, 1);
  tensor.set(0, value);
  return tensor;
}

/// Sizes around every vector width, tails and unrollings, of every mix of dtypes, in one list.
AccumulateList every_size_and_mix(GuardSide side, std::int64_t shift) {
  AccumulateList list;
  for (const ScalarType type : kListDtypes) {
    for (const ScalarType grad_type : kListDtypes) {
      for (std::int64_t count = 0; count <= 70; ++count) {
        list.add(ListTensor(type, count, side, shift), ListTensor(grad_type, count, side, shift));
      }
    }
  }
  return list;
}

TEST_P(Accumulate, EverySizeAndMixOfDtypes) {
  const ListTensor half = scalar(ScalarType::kFloat32, 0.375);
  for (const GuardSide side : {GuardSide::kBack, GuardSide::kFront}) {
    const AccumulateList list = every_size_and_mix(side, 0);
    check(list, 1.0);
    check(list, 0.0);
    check(list, 0.75, half);
  }
}

TEST_P(Accumulate, UnalignedAddresses) {
  for (const std::int64_t shift : {1, 2, 4, 8, 12}) {
    const AccumulateList list = every_size_and_mix(GuardSide::kFront, shift);
    check(list, 1.0);
    check(list, 0.0);
  }
}

TEST_P(Accumulate, ScaleOfEveryDtype) {
  AccumulateList list;
  for (const std::int64_t count : {1, 37}) {
    list.add(ListTensor(ScalarType::kFloat32, count), ListTensor(ScalarType::kBFloat16, count));
    list.add(ListTensor(ScalarType::kFloat64, count), ListTensor(ScalarType::kFloat64, count));
  }
  for (const ScalarType type : kListDtypes) {
    for (const double value : {0.0, -1.5, 0.3}) check(list, 1.0, scalar(type, value));
    check(list, 0.0, scalar(type, kInfinity));
    check(list, 1.0, scalar(type, kNan));
  }
}

TEST_P(Accumulate, BetaOfZeroNeverReads) {
  // Memory that holds NaN, for every mix, and also where stores pass the caches.
  AccumulateList list;
  for (const ScalarType type : kListDtypes) {
    for (const ScalarType grad_type : kListDtypes) {
      for (const std::int64_t count : {1, 7, 16, 70, 1000}) {
        list.add(ListTensor(type, count), ListTensor(grad_type, count), false, true);
        const ListPlace transposed{{3, count}, {1, 3}};
        list.add(ListTensor(type, transposed), ListTensor(grad_type, ListPlace{{3, count}, {}}),
                 true, true);
      }
    }
  }
  check(list, 0.0);
}

TEST_P(Accumulate, NonFiniteGradientsArrive) {
  for (const ScalarType type : kListDtypes) {
    for (const ScalarType grad_type : kListDtypes) {
      AccumulateList list;
      list.add(ListTensor(type, 40), ListTensor(grad_type, 40));
      list.grad(0).set(3, kInfinity);
      list.grad(0).set(20, -kInfinity);
      list.grad(0).set(39, kNan);
      check(list, 1.0);
      check(list, 0.0);
    }
  }
}

TEST_P(Accumulate, SmallAddendsSurviveInFloat) {
  // In bf16 alone 256 + 1 - 256 is 0.
  for (const ScalarType grad_type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (std::int64_t count = 1; count <= 70; ++count) {
      const ListTensor accumulator(ScalarType::kFloat32, count);
      const ListTensor grad(grad_type, count);
      double beta = 0.0;
      for (const double value : {256.0, 1.0, -256.0}) {
        grad.fill([value](std::int64_t) { return value; });
        const AccumulateEntry entry{
            .count = count, .accumulator = accumulator.operand(), .grad = grad.const_operand()};
        kernel().accumulate({.entries = &entry, .num_entries = 1, .beta = beta},
                            SerialTaskRunner());
        beta = 1.0;
      }
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(accumulator.get(i), 1.0) << i;
    }
  }
}

TEST_P(Accumulate, RoundsToNearestEven) {
  // Ties and overflow of the narrow dtypes: the sums are exact in fp32, so there is one right
  // answer.
  for (const auto& [type, start, addend, sum] :
       {std::tuple{ScalarType::kBFloat16, 256.0, 1.0, 256.0},
        {ScalarType::kBFloat16, 258.0, 1.0, 260.0},
        {ScalarType::kFloat16, 2048.0, 1.0, 2048.0},
        {ScalarType::kFloat16, 2050.0, 1.0, 2052.0},
        {ScalarType::kFloat16, 65504.0, 16.0, kInfinity},
        {ScalarType::kFloat16, 65504.0, 15.0, 65504.0}}) {
    for (const std::int64_t count : {1, 33}) {
      const ListTensor accumulator(type, count);
      const ListTensor grad(ScalarType::kFloat32, count);
      accumulator.fill([start = start](std::int64_t) { return start; });
      grad.fill([addend = addend](std::int64_t) { return addend; });
      const AccumulateEntry entry{
          .count = count, .accumulator = accumulator.operand(), .grad = grad.const_operand()};
      kernel().accumulate({.entries = &entry, .num_entries = 1}, SerialTaskRunner());
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(accumulator.get(i), sum);
    }
  }
}

TEST_P(Accumulate, InPlace) {
  // The gradient is the accumulator itself: doubled.
  for (const ScalarType type : kListDtypes) {
    const ListTensor tensor(type, 70);
    tensor.fill(1);
    const ListTensor before = tensor.copy();
    const AccumulateEntry entry{
        .count = 70, .accumulator = tensor.operand(), .grad = tensor.const_operand()};
    kernel().accumulate({.entries = &entry, .num_entries = 1}, SerialTaskRunner());
    for (std::int64_t i = 0; i < 70; ++i) ASSERT_EQ(tensor.get(i), 2.0 * before.get(i));
  }
}

/// Layouts of a (3, 18, 150) tensor, each in a loop of its own dimensions.
std::vector<ListPlace> strided_places() {
  return {
      {{3, 18, 150}, {2700, 150, 1}},  // dense
      {{3, 18, 150}, {3000, 160, 1}},  // padded rows
      {{3, 18, 150}, {2700, 1, 18}},   // transposed
      {{3, 18, 150}, {1, 3, 54}},      // outermost first
      {{3, 18, 150}, {5400, 300, 2}},  // every second element
      {{3, 18, 150}, {150, 450, 1}},   // rows of three tensors in turn
      {{3, 18, 150}, {6000, 1, 20}},   // transposed with padding
      {{3, 18, 150}, {2700, 150, 1}, GuardSide::kFront, 1},
  };
}

TEST_P(Accumulate, Strides) {
  for (const ScalarType type : kListDtypes) {
    for (const ScalarType grad_type : kListDtypes) {
      AccumulateList list;
      for (const ListPlace& place : strided_places()) {
        for (const ListPlace& grad_place : strided_places()) {
          list.add(ListTensor(type, place), ListTensor(grad_type, grad_place), true);
        }
      }
      check(list, 1.0);
      check(list, 0.0, scalar(ScalarType::kFloat64, 0.7));
      check(list, -0.5);
    }
  }
}

TEST_P(Accumulate, SmallStridedShapes) {
  AccumulateList list;
  for (const ScalarType type : kListDtypes) {
    for (std::int64_t rows = 1; rows <= 17; ++rows) {
      for (const std::int64_t cols : {1, 2, 15, 16, 17, 33, 129}) {
        list.add(ListTensor(type, {{rows, cols}, {}}),
                 ListTensor(ScalarType::kBFloat16, {{rows, cols}, {1, rows}}), true);
        list.add(ListTensor(type, {{rows, cols}, {2 * cols, 1}}),
                 ListTensor(ScalarType::kFloat32, {{rows, cols}, {0, 1}}), true);
        list.add(ListTensor(type, {{cols}, {3}}), ListTensor(ScalarType::kFloat32, {{cols}, {0}}),
                 true);
        list.add(ListTensor(type, {{2, 1, rows, 1, cols}, {rows * cols, 7, cols, 9, 1}}),
                 ListTensor(ScalarType::kFloat16, {{2, 1, rows, 1, cols}, {1, 5, 2, 3, 2 * rows}}),
                 true);
      }
    }
    list.add(ListTensor(type, {{0, 5}, {5, 1}}), ListTensor(type, {{0, 5}, {1, 3}}), true);
  }
  check(list, 1.0);
  check(list, 0.0);
}

AccumulateList large_mixed_list() {
  AccumulateList list;
  list.add(ListTensor(ScalarType::kFloat32, 3 * kListBlock + 5),
           ListTensor(ScalarType::kBFloat16, 3 * kListBlock + 5));
  for (int i = 0; i < 200; ++i) {
    list.add(ListTensor(ScalarType::kFloat32, 64), ListTensor(ScalarType::kBFloat16, 64));
  }
  list.add(ListTensor(ScalarType::kBFloat16, kListBlock - 1),
           ListTensor(ScalarType::kFloat32, kListBlock - 1));
  list.add(ListTensor(ScalarType::kFloat64, kListBlock + 1),
           ListTensor(ScalarType::kFloat16, kListBlock + 1));
  list.add(ListTensor(ScalarType::kFloat32, {{300, 400}, {}}),
           ListTensor(ScalarType::kFloat32, {{300, 400}, {1, 300}}), true);
  list.add(ListTensor(ScalarType::kFloat32, 400000), ListTensor(ScalarType::kFloat32, 400000));
  list.add(ListTensor(ScalarType::kFloat32, 0), ListTensor(ScalarType::kFloat32, 0));
  return list;
}

TEST_P(Accumulate, LargeMixedList) {
  const AccumulateList list = large_mixed_list();
  check(list, 1.0);
  check(list, 0.5, scalar(ScalarType::kFloat32, 3.0), ThreadTaskRunner(3));
}

TEST_P(Accumulate, EveryThreadCountGivesTheSameBits) {
  const AccumulateList list = large_mixed_list();
  for (const double beta : {0.0, 1.0, 0.3}) {
    AccumulateList serial = list.copy();
    kernel().accumulate(serial.params(beta), SerialTaskRunner());
    const std::vector<std::uint8_t> expected = serial.bytes();
    for (int workers = 1; workers <= 7; ++workers) {
      AccumulateList threaded = list.copy();
      kernel().accumulate(threaded.params(beta), ThreadTaskRunner(workers, 10u + workers));
      EXPECT_TRUE(threaded.bytes() == expected) << workers << " threads, beta " << beta;
      AccumulateList reversed = list.copy();
      kernel().accumulate(reversed.params(beta), ReversedTaskRunner(workers));
      EXPECT_TRUE(reversed.bytes() == expected) << workers << " workers in reverse";
    }
  }
}

TEST_P(Accumulate, LargeOverwriteAtEveryAlignment) {
  // Beyond the size from which stores pass the caches.
  constexpr std::int64_t kCount = (5 << 20) + 37;
  for (const std::int64_t shift : {0, 4, 60}) {
    for (const ScalarType grad_type : {ScalarType::kFloat32, ScalarType::kBFloat16}) {
      const ListTensor accumulator(ScalarType::kFloat32, kCount, GuardSide::kFront, shift);
      const ListTensor grad(grad_type, kCount, GuardSide::kFront);
      grad.fill([](std::int64_t i) { return static_cast<double>(i % 251 + 1); });
      const AccumulateEntry entry{
          .count = kCount, .accumulator = accumulator.operand(), .grad = grad.const_operand()};
      kernel().accumulate({.entries = &entry, .num_entries = 1, .beta = 0.0}, ThreadTaskRunner(2));
      std::int64_t wrong = 0;
      for (std::int64_t i = 0; i < kCount; ++i) {
        wrong += accumulator.get(i) != static_cast<double>(i % 251 + 1);
      }
      EXPECT_EQ(wrong, 0) << "shift " << shift;
    }
  }
}

TEST_P(Accumulate, EmptyLists) {
  kernel().accumulate({}, SerialTaskRunner());
  kernel().accumulate({}, ThreadTaskRunner(3));
  AccumulateList list;
  for (int i = 0; i < 5; ++i) {
    list.add(ListTensor(ScalarType::kFloat32, 0), ListTensor(ScalarType::kBFloat16, 0));
  }
  check(list, 1.0, {}, ThreadTaskRunner(3));
}

TORCH_EXT_TEST_EACH_LIST_KERNEL(Accumulate);

}  // namespace
}  // namespace torch_ext::testing
