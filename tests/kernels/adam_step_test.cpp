// AdamW and Adam over a list of tensors on every instruction set against the reference.
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

struct AdamTypes {
  ScalarType param = ScalarType::kFloat32;
  ScalarType accumulator = ScalarType::kFloat32;
  ScalarType state = ScalarType::kFloat32;
  bool has_master = false;
  ScalarType master = ScalarType::kFloat32;
};

/// All that one entry points to.
struct AdamTensors {
  ListTensor param, accumulator, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step;
  std::shared_ptr<LoopNumbers> loop;

  std::vector<const ListTensor*> all() const {
    return {&param, &accumulator, &exp_avg, &exp_avg_sq, &max_exp_avg_sq, &master, &step};
  }
};

/// `places`: of param, accumulator, exp_avg, exp_avg_sq, max_exp_avg_sq, master.
AdamTensors make_tensors(const AdamTypes& types, const std::vector<ListPlace>& places,
                         std::uint64_t seed, bool strided) {
  AdamTensors t;
  t.param = ListTensor(types.param, places[0]);
  t.accumulator = ListTensor(types.accumulator, places[1]);
  t.exp_avg = ListTensor(types.state, places[2]);
  t.exp_avg_sq = ListTensor(types.state, places[3]);
  t.max_exp_avg_sq = ListTensor(types.state, places[4]);
  if (types.has_master) t.master = ListTensor(types.master, places[5]);
  t.step = ListTensor(seed % 2 == 0 ? ScalarType::kFloat32 : ScalarType::kFloat64, 1);
  t.param.fill(8 * seed);
  t.accumulator.fill(8 * seed + 1);
  t.exp_avg.fill(8 * seed + 2);
  const auto positive = [&](std::uint64_t offset) {
    return [=](std::int64_t i) { return std::fabs(varied_number(8 * seed + offset, i)); };
  };
  t.exp_avg_sq.fill(positive(3));
  t.max_exp_avg_sq.fill(positive(4));
  if (types.has_master) {
    t.master.fill(8 * seed + 5);
    round_masters(t.param, t.master);
  }
  t.step.set(0, static_cast<double>(seed % 3));
  if (strided) {
    t.loop = std::make_shared<LoopNumbers>(std::initializer_list<const ListTensor*>{
        &t.param, &t.accumulator, &t.exp_avg, &t.exp_avg_sq, &t.max_exp_avg_sq, &t.master});
  }
  return t;
}

AdamTensors make_tensors(const AdamTypes& types, std::int64_t count, std::uint64_t seed,
                         GuardSide side = GuardSide::kBack, std::int64_t shift = 0) {
  return make_tensors(types, std::vector<ListPlace>(6, ListPlace{{count}, {}, side, shift}), seed,
                      false);
}

class AdamList {
 public:
  void add(AdamTensors tensors) { list_.push_back(std::move(tensors)); }
  const std::vector<AdamTensors>& list() const { return list_; }

  AdamList copy() const {
    AdamList other;
    for (const AdamTensors& t : list_) {
      other.list_.push_back({t.param.copy(), t.accumulator.copy(), t.exp_avg.copy(),
                             t.exp_avg_sq.copy(), t.max_exp_avg_sq.copy(), t.master.copy(),
                             t.step.copy(), t.loop});
    }
    return other;
  }

  AdamParams params(AdamParams params) {
    entries_.clear();
    for (const AdamTensors& t : list_) {
      entries_.push_back({.count = t.param.count(),
                          .param = t.param.operand(),
                          .accumulator = t.accumulator.operand(),
                          .exp_avg = t.exp_avg.operand(),
                          .exp_avg_sq = t.exp_avg_sq.operand(),
                          .max_exp_avg_sq = params.amsgrad ? t.max_exp_avg_sq.operand() : Operand{},
                          .master = t.master ? t.master.operand() : Operand{},
                          .loop = t.loop == nullptr ? StridedLoop{} : t.loop->loop(),
                          .step = t.step.operand()});
    }
    params.entries = entries_.data();
    params.num_entries = static_cast<std::int64_t>(entries_.size());
    return params;
  }

  std::vector<std::uint8_t> bytes() const {
    std::vector<std::uint8_t> all;
    for (const AdamTensors& t : list_) {
      for (const ListTensor* tensor : t.all()) {
        const std::vector<std::uint8_t> own = tensor->bytes();
        all.insert(all.end(), own.begin(), own.end());
      }
    }
    return all;
  }

 private:
  std::vector<AdamTensors> list_;
  std::vector<AdamEntry> entries_;
};

ListTensor scalar(ScalarType type, double value) {
  ListTensor tensor(type, 1);
  tensor.set(0, value);
  return tensor;
}

constexpr OptimizerSettings kSettings{.lr = 0.02, .weight_decay = 0.1};

class AdamStep : public KernelTest {
 protected:
  void check(const AdamList& list, const AdamParams& settings,
             const TaskRunner& runner = SerialTaskRunner()) const {
    AdamList actual = list.copy();
    AdamList expected = list.copy();
    kernel().adam_step(actual.params(settings), runner);
    adam_step_reference(expected.params(settings));
    static constexpr const char* kNames[] = {
        "param", "accumulator", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step"};
    for (std::size_t i = 0; i < list.list().size(); ++i) {
      const std::vector<const ListTensor*> got = actual.list()[i].all();
      const std::vector<const ListTensor*> wanted = expected.list()[i].all();
      bool is_double = false;
      for (std::size_t k = 0; k + 1 < got.size(); ++k) {
        is_double = is_double || (*got[k] && got[k]->type() == ScalarType::kFloat64 &&
                                  (k != 4 || settings.amsgrad));
      }
      for (std::size_t k = 0; k < got.size(); ++k) {
        expect_close(*got[k], *wanted[k], {is_double, 4.0},
                     "entry " + std::to_string(i) + " " + kNames[k]);
      }
    }
  }
};

std::vector<AdamTypes> type_mixes() {
  std::vector<AdamTypes> mixes;
  for (const ScalarType type : kListDtypes) {
    mixes.push_back({type, type, type});
    mixes.push_back({type, ScalarType::kFloat32, ScalarType::kFloat32});
    mixes.push_back({type, ScalarType::kFloat32, ScalarType::kBFloat16});
    mixes.push_back({type, ScalarType::kFloat32, ScalarType::kFloat32, true});
    mixes.push_back({ScalarType::kFloat32, type, ScalarType::kFloat32});
    mixes.push_back({ScalarType::kBFloat16, type, ScalarType::kFloat64, true});
    mixes.push_back({ScalarType::kBFloat16, type, ScalarType::kBFloat16, true, type});
  }
  return mixes;
}

TEST_P(AdamStep, EverySizeAndMixOfDtypes) {
  std::uint64_t seed = 0;
  for (const AdamTypes& types : type_mixes()) {
    AdamList list;
    for (std::int64_t count = 0; count <= 70; ++count) {
      list.add(make_tensors(types, count, ++seed));
    }
    check(list, {.settings = kSettings});
    check(list, {.settings = kSettings, .decoupled = false, .amsgrad = true});
  }
}

TEST_P(AdamStep, UnalignedAddresses) {
  for (const std::int64_t shift : {0, 1, 2, 4, 12}) {
    AdamList list;
    std::uint64_t seed = 0;
    for (const AdamTypes& types : type_mixes()) {
      for (const std::int64_t count : {1, 5, 16, 17, 64, 70}) {
        list.add(make_tensors(types, count, ++seed, GuardSide::kFront, shift));
      }
    }
    check(list, {.settings = kSettings, .amsgrad = true});
  }
}

AdamList small_list() {
  AdamList list;
  std::uint64_t seed = 0;
  for (const AdamTypes& types : type_mixes()) list.add(make_tensors(types, 37, ++seed));
  return list;
}

TEST_P(AdamStep, EveryOption) {
  const ListTensor coefficient = scalar(ScalarType::kFloat32, 0.625);
  const ListTensor no_inf = scalar(ScalarType::kFloat32, 0.0);
  for (const bool decoupled : {true, false}) {
    for (const bool amsgrad : {false, true}) {
      for (const bool maximize : {false, true}) {
        for (const double weight_decay : {0.0, 0.3}) {
          for (const bool reset : {true, false}) {
            for (const bool scaled : {false, true}) {
              check(small_list(),
                    {.settings = {.lr = 0.05,
                                  .weight_decay = weight_decay,
                                  .maximize = maximize,
                                  .reset = reset,
                                  .coefficient =
                                      scaled ? coefficient.const_operand() : ConstOperand{},
                                  .found_inf = scaled ? no_inf.const_operand() : ConstOperand{}},
                     .beta1 = 0.8,
                     .beta2 = 0.97,
                     .eps = 1e-6,
                     .decoupled = decoupled,
                     .amsgrad = amsgrad});
            }
          }
        }
      }
    }
  }
}

TEST_P(AdamStep, ExtremeHyperparameters) {
  for (const double beta1 : {0.0, 0.3, 0.999}) {
    for (const double beta2 : {0.0, 0.5, 0.99999}) {
      check(small_list(), {.settings = {.lr = 0.0}, .beta1 = beta1, .beta2 = beta2});
      check(small_list(), {.settings = kSettings, .beta1 = beta1, .beta2 = beta2, .eps = 0.1});
    }
  }
}

TEST_P(AdamStep, CoefficientOfEveryDtype) {
  for (const ScalarType type : kListDtypes) {
    const ListTensor coefficient = scalar(type, -0.375);
    OptimizerSettings settings = kSettings;
    settings.coefficient = coefficient.const_operand();
    check(small_list(), {.settings = settings});
  }
}

TEST_P(AdamStep, FirstStepsFromZeroState) {
  // The bias corrections of steps 1 to 5 matter most here; each step starts where the last ended.
  AdamList list;
  std::uint64_t seed = 0;
  for (const AdamTypes& types : type_mixes()) {
    AdamTensors tensors = make_tensors(types, 21, ++seed);
    for (const ListTensor* state :
         {&tensors.exp_avg, &tensors.exp_avg_sq, &tensors.max_exp_avg_sq, &tensors.step}) {
      state->fill([](std::int64_t) { return 0.0; });
    }
    list.add(std::move(tensors));
  }
  for (int step = 0; step < 5; ++step) {
    check(list, {.settings = kSettings, .amsgrad = true});
    kernel().adam_step(list.params({.settings = kSettings, .amsgrad = true}), SerialTaskRunner());
    for (const AdamTensors& tensors : list.list()) {
      EXPECT_EQ(tensors.step.get(0), step + 1);
      tensors.accumulator.fill(1000u + static_cast<std::uint64_t>(step));
    }
  }
}

TEST_P(AdamStep, FoundInfSkipsAllButTheReset) {
  for (const double found : {1.0, kInfinity, kNan}) {
    for (const ScalarType type : kListDtypes) {
      for (const bool reset : {true, false}) {
        const ListTensor found_inf = scalar(type, found);
        AdamList list = small_list();
        list.add(
            make_tensors({}, std::vector<ListPlace>(6, ListPlace{{20, 30}, {1, 25}}), 3, true));
        for (const AdamTensors& t : list.list()) t.accumulator.set(5, kNan);
        const AdamList before = list.copy();
        OptimizerSettings settings = kSettings;
        settings.reset = reset;
        settings.found_inf = found_inf.const_operand();
        kernel().adam_step(list.params({.settings = settings, .amsgrad = true}),
                           ThreadTaskRunner(2));
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
}

TEST_P(AdamStep, Strides) {
  const ListPlace dense{{3, 18, 150}, {2700, 150, 1}};
  const ListPlace padded{{3, 18, 150}, {3000, 160, 1}};
  const ListPlace transposed{{3, 18, 150}, {2700, 1, 18}};
  const ListPlace apart{{3, 18, 150}, {1, 9, 324}};
  for (const AdamTypes& types : type_mixes()) {
    AdamList list;
    list.add(make_tensors(types, {dense, transposed, dense, padded, apart, dense}, 1, true));
    list.add(make_tensors(types, {transposed, dense, padded, apart, dense, transposed}, 2, true));
    list.add(make_tensors(types, {apart, apart, apart, apart, apart, padded}, 3, true));
    check(list, {.settings = kSettings, .amsgrad = true});
    check(list, {.settings = kSettings});
  }
}

TEST_P(AdamStep, NonFiniteGradientsArriveWithoutFoundInf) {
  AdamList list = small_list();
  for (const AdamTensors& t : list.list()) {
    t.accumulator.set(4, kNan);
    t.max_exp_avg_sq.set(9, kNan);
  }
  check(list, {.settings = kSettings, .amsgrad = true});
}

TEST_P(AdamStep, WithoutDecayInfiniteWeightsDoNoHarm) {
  // 0 * inf must not become a NaN of the averages.
  AdamList list = small_list();
  for (const AdamTensors& t : list.list()) {
    t.param.set(2, kInfinity);
    if (t.master) t.master.set(2, kInfinity);
  }
  check(list, {.settings = {.lr = 0.02}, .decoupled = false});
  check(list, {.settings = {.lr = 0.02}, .decoupled = true});
}

AdamList large_mixed_list() {
  AdamList list;
  list.add(make_tensors({}, 3 * kListBlock + 5, 1));
  for (std::uint64_t i = 0; i < 60; ++i) list.add(make_tensors({}, 64, 2 + i));
  const AdamTypes master{ScalarType::kBFloat16, ScalarType::kFloat32, ScalarType::kFloat32, true};
  list.add(make_tensors(master, 2 * kListBlock + 1029, 100));
  const ListPlace dense{{200, 300}, {}};
  const ListPlace transposed{{200, 300}, {1, 200}};
  list.add(make_tensors(master, {dense, transposed, dense, dense, dense, transposed}, 101, true));
  list.add(make_tensors({}, 100000, 102));
  return list;
}

TEST_P(AdamStep, LargeMixedList) {
  check(large_mixed_list(), {.settings = kSettings, .amsgrad = true}, ThreadTaskRunner(3));
}

TEST_P(AdamStep, EveryThreadCountGivesTheSameBits) {
  const AdamList list = large_mixed_list();
  AdamList serial = list.copy();
  kernel().adam_step(serial.params({.settings = kSettings}), SerialTaskRunner());
  const std::vector<std::uint8_t> expected = serial.bytes();
  for (int workers = 1; workers <= 7; ++workers) {
    AdamList threaded = list.copy();
    kernel().adam_step(threaded.params({.settings = kSettings}),
                       ThreadTaskRunner(workers, 20u + static_cast<unsigned>(workers)));
    EXPECT_TRUE(threaded.bytes() == expected) << workers << " threads";
    AdamList reversed = list.copy();
    kernel().adam_step(reversed.params({.settings = kSettings}), ReversedTaskRunner(workers));
    EXPECT_TRUE(reversed.bytes() == expected) << workers << " workers in reverse";
  }
}

TEST_P(AdamStep, EmptyLists) {
  kernel().adam_step({}, ThreadTaskRunner(2));
  AdamList list;
  list.add(make_tensors({}, 0, 1));
  check(list, {.settings = kSettings});  // counts the step all the same
}

TORCH_EXT_TEST_EACH_LIST_KERNEL(AdamStep);

}  // namespace
}  // namespace torch_ext::testing
