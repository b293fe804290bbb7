// SGD over a list of tensors on every instruction set against the reference.
#include <gtest/gtest.h>

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

struct SgdTypes {
  ScalarType param = ScalarType::kFloat32;
  ScalarType accumulator = ScalarType::kFloat32;
  ScalarType momentum_buffer = ScalarType::kFloat32;
  bool has_master = false;
};

struct SgdTensors {
  ListTensor param, accumulator, momentum_buffer, master;
  bool first_step = false;
  std::shared_ptr<LoopNumbers> loop;

  std::vector<const ListTensor*> all() const {
    return {&param, &accumulator, &momentum_buffer, &master};
  }
};

/// `places`: of param, accumulator, momentum_buffer, master. Every third entry is at its first
/// step, its buffer holding NaN.
SgdTensors make_tensors(const SgdTypes& types, const std::vector<ListPlace>& places,
                        std::uint64_t seed, bool strided) {
  SgdTensors t;
  t.param = ListTensor(types.param, places[0]);
  t.accumulator = ListTensor(types.accumulator, places[1]);
  t.momentum_buffer = ListTensor(types.momentum_buffer, places[2]);
  if (types.has_master) t.master = ListTensor(ScalarType::kFloat32, places[3]);
  t.first_step = seed % 3 == 0;
  t.param.fill(4 * seed);
  t.accumulator.fill(4 * seed + 1);
  if (!t.first_step) t.momentum_buffer.fill(4 * seed + 2);
  if (types.has_master) {
    t.master.fill(4 * seed + 3);
    round_masters(t.param, t.master);
  }
  if (strided) {
    t.loop = std::make_shared<LoopNumbers>(std::initializer_list<const ListTensor*>{
        &t.param, &t.accumulator, &t.momentum_buffer, &t.master});
  }
  return t;
}

SgdTensors make_tensors(const SgdTypes& types, std::int64_t count, std::uint64_t seed,
                        GuardSide side = GuardSide::kBack, std::int64_t shift = 0) {
  return make_tensors(types, std::vector<ListPlace>(4, ListPlace{{count}, {}, side, shift}), seed,
                      false);
}

class SgdList {
 public:
  void add(SgdTensors tensors) { list_.push_back(std::move(tensors)); }
  const std::vector<SgdTensors>& list() const { return list_; }

  SgdList copy() const {
    SgdList other;
    for (const SgdTensors& t : list_) {
      other.list_.push_back({t.param.copy(), t.accumulator.copy(), t.momentum_buffer.copy(),
                             t.master.copy(), t.first_step, t.loop});
    }
    return other;
  }

  SgdParams params(SgdParams params) {
    entries_.clear();
    for (const SgdTensors& t : list_) {
      entries_.push_back(
          {.count = t.param.count(),
           .param = t.param.operand(),
           .accumulator = t.accumulator.operand(),
           .momentum_buffer = params.momentum != 0.0 ? t.momentum_buffer.operand() : Operand{},
           .master = t.master ? t.master.operand() : Operand{},
           .loop = t.loop == nullptr ? StridedLoop{} : t.loop->loop(),
           .first_step = t.first_step});
    }
    params.entries = entries_.data();
    params.num_entries = static_cast<std::int64_t>(entries_.size());
    return params;
  }

  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all;
    for (const SgdTensors& t : list_) {
      for (const ListTensor* tensor : t.all()) {
        const std::vector<std::uint8_t> own = tensor->bytes();
        all.insert(all.end(), own.begin(), own.end());
      }
    }
    return all;
  }

 private:
  std::vector<SgdTensors> list_;
  std::vector<SgdEntry> entries_;
};

ListTensor scalar(ScalarType type, double value) {
  ListTensor tensor(type, 1);
  tensor.set(0, value);
  return tensor;
}

constexpr OptimizerSettings kSettings{.lr = 0.1, .weight_decay = 0.2};

class SgdStep : public KernelTest {
 protected:
  void check(const SgdList& list, const SgdParams& settings,
             const TaskRunner& runner = SerialTaskRunner()) const {
    SgdList actual = list.copy();
    SgdList expected = list.copy();
    kernel().sgd_step(actual.params(settings), runner);
    sgd_step_reference(expected.params(settings));
    static constexpr const char* kNames[] = {"param", "accumulator", "momentum_buffer", "master"};
    for (std::size_t i = 0; i < list.list().size(); ++i) {
      const std::vector<const ListTensor*> got = actual.list()[i].all();
      const std::vector<const ListTensor*> wanted = expected.list()[i].all();
      bool is_double = false;
      for (std::size_t k = 0; k < got.size(); ++k) {
        is_double = is_double || (*got[k] && got[k]->type() == ScalarType::kFloat64 &&
                                  (k != 2 || settings.momentum != 0.0));
      }
      for (std::size_t k = 0; k < got.size(); ++k) {
        expect_close(*got[k], *wanted[k], {is_double, 4.0},
                     "entry " + std::to_string(i) + " " + kNames[k]);
      }
    }
  }
};

std::vector<SgdTypes> type_mixes() {
  std::vector<SgdTypes> mixes;
  for (const ScalarType type : kListDtypes) {
    mixes.push_back({type, type, type});
    mixes.push_back({type, ScalarType::kFloat32, ScalarType::kFloat32});
    mixes.push_back({type, ScalarType::kFloat32, ScalarType::kFloat32, true});
    mixes.push_back({ScalarType::kFloat32, type, ScalarType::kFloat32});
    mixes.push_back({ScalarType::kBFloat16, type, ScalarType::kFloat16, true});
    mixes.push_back({ScalarType::kFloat16, ScalarType::kBFloat16, type});
  }
  return mixes;
}

TEST_P(SgdStep, EverySizeAndMixOfDtypes) {
  std::uint64_t seed = 0;
  for (const SgdTypes& types : type_mixes()) {
    SgdList list;
    for (std::int64_t count = 0; count <= 70; ++count) {
      list.add(make_tensors(types, count, ++seed));
    }
    check(list, {.settings = kSettings});
    check(list, {.settings = kSettings, .momentum = 0.9, .dampening = 0.3});
  }
}

TEST_P(SgdStep, UnalignedAddresses) {
  for (const std::int64_t shift : {0, 1, 2, 4, 12}) {
    SgdList list;
    std::uint64_t seed = 0;
    for (const SgdTypes& types : type_mixes()) {
      for (const std::int64_t count : {1, 5, 16, 17, 64, 70}) {
        list.add(make_tensors(types, count, ++seed, GuardSide::kFront, shift));
      }
    }
    check(list, {.settings = kSettings, .momentum = 0.5});
  }
}

SgdList small_list() {
  SgdList list;
  std::uint64_t seed = 0;
  for (const SgdTypes& types : type_mixes()) {
    for (const std::int64_t count : {6, 37}) list.add(make_tensors(types, count, ++seed));
  }
  return list;
}

TEST_P(SgdStep, EveryOption) {
  const ListTensor coefficient = scalar(ScalarType::kFloat64, 0.625);
  const ListTensor no_inf = scalar(ScalarType::kFloat32, 0.0);
  for (const double momentum : {0.0, 0.9}) {
    for (const double dampening : {0.0, 0.4}) {
      for (const bool nesterov : {false, true}) {
        for (const double weight_decay : {0.0, 0.3}) {
          for (const bool maximize : {false, true}) {
            for (const bool reset : {true, false}) {
              check(small_list(), {.settings = {.lr = 0.05,
                                                .weight_decay = weight_decay,
                                                .maximize = maximize,
                                                .reset = reset,
                                                .coefficient = coefficient.const_operand(),
                                                .found_inf = no_inf.const_operand()},
                                   .momentum = momentum,
                                   .dampening = dampening,
                                   .nesterov = nesterov});
            }
          }
        }
      }
    }
  }
}

TEST_P(SgdStep, FoundInfSkipsAllButTheReset) {
  for (const double found : {1.0, kInfinity, kNan}) {
    for (const bool reset : {true, false}) {
      const ListTensor found_inf = scalar(ScalarType::kFloat32, found);
      SgdList list = small_list();
      list.add(make_tensors({}, std::vector<ListPlace>(4, ListPlace{{20, 30}, {1, 25}}), 4, true));
      for (const SgdTensors& t : list.list()) t.accumulator.set(5, kNan);
      const SgdList before = list.copy();
      OptimizerSettings settings = kSettings;
      settings.reset = reset;
      settings.found_inf = found_inf.const_operand();
      kernel().sgd_step(list.params({.settings = settings, .momentum = 0.9}), ThreadTaskRunner(2));
      for (std::size_t i = 0; i < list.list().size(); ++i) {
        const std::vector<const ListTensor*> now = list.list()[i].all();
        const std::vector<const ListTensor*> old = before.list()[i].all();
        for (std::size_t k = 0; k < now.size(); ++k) {
          EXPECT_TRUE(now[k]->gaps_intact());
          if (now[k] != &list.list()[i].accumulator || !reset) {
            EXPECT_TRUE(now[k]->bytes() == old[k]->bytes()) << "entry " << i << " tensor " << k;
            continue;
          }
          for (std::int64_t e = 0; e < now[k]->count(); ++e) ASSERT_EQ(now[k]->get(e), 0.0);
        }
      }
    }
  }
}

TEST_P(SgdStep, Strides) {
  const ListPlace dense{{3, 18, 150}, {2700, 150, 1}};
  const ListPlace padded{{3, 18, 150}, {3000, 160, 1}};
  const ListPlace transposed{{3, 18, 150}, {2700, 1, 18}};
  const ListPlace apart{{3, 18, 150}, {1, 9, 324}};
  for (const SgdTypes& types : type_mixes()) {
    SgdList list;
    list.add(make_tensors(types, {dense, transposed, apart, dense}, 1, true));
    list.add(make_tensors(types, {transposed, padded, dense, transposed}, 2, true));
    list.add(make_tensors(types, {apart, dense, padded, padded}, 3, true));
    check(list, {.settings = kSettings, .momentum = 0.9});
    check(list, {.settings = kSettings});
  }
}

TEST_P(SgdStep, NonFiniteGradientsArriveWithoutFoundInf) {
  SgdList list = small_list();
  for (const SgdTensors& t : list.list()) t.accumulator.set(4, kNan);
  check(list, {.settings = kSettings, .momentum = 0.9});
}

TEST_P(SgdStep, EveryThreadCountGivesTheSameBits) {
  SgdList list;
  list.add(make_tensors({}, 3 * kListBlock + 5, 1));
  for (std::uint64_t i = 0; i < 60; ++i) list.add(make_tensors({}, 64, 2 + i));
  const SgdTypes master{ScalarType::kBFloat16, ScalarType::kFloat32, ScalarType::kFloat32, true};
  list.add(make_tensors(master, 2 * kListBlock + 1029, 100));
  const ListPlace dense{{200, 300}, {}};
  const ListPlace transposed{{200, 300}, {1, 200}};
  list.add(make_tensors(master, {dense, transposed, dense, transposed}, 101, true));
  list.add(make_tensors({}, 200000, 103));
  const SgdParams settings{.settings = kSettings, .momentum = 0.9, .nesterov = true};
  check(list, settings, ThreadTaskRunner(3));
  SgdList serial = list.copy();
  kernel().sgd_step(serial.params(settings), SerialTaskRunner());
  const std::vector<std::uint8_t> expected = serial.bytes();
  for (int workers = 1; workers <= 7; ++workers) {
    SgdList threaded = list.copy();
    kernel().sgd_step(threaded.params(settings),
                      ThreadTaskRunner(workers, 20u + static_cast<unsigned>(workers)));
    EXPECT_TRUE(threaded.bytes() == expected) << workers << " threads";
    SgdList reversed = list.copy();
    kernel().sgd_step(reversed.params(settings), ReversedTaskRunner(workers));
    EXPECT_TRUE(reversed.bytes() == expected) << workers << " workers in reverse";
  }
}

TEST_P(SgdStep, EmptyLists) {
  kernel().sgd_step({}, ThreadTaskRunner(2));
  SgdList list;
  list.add(make_tensors({}, 0, 1));
  check(list, {.settings = kSettings, .momentum = 0.5});
}

TORCH_EXT_TEST_EACH_LIST_KERNEL(SgdStep);

}  // namespace
}  // namespace torch_ext::testing
