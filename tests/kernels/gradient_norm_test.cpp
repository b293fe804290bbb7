// Norms and finiteness of a list of gradients on every instruction set against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
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

class GradList {
 public:
  ListTensor add(ListTensor grad, bool strided = false) {
    grad.fill(tensors_.size());
    loops_.push_back(
        strided ? std::make_shared<LoopNumbers>(std::initializer_list<const ListTensor*>{&grad})
                : nullptr);
    tensors_.push_back(grad);
    return grad;
  }

  std::vector<GradStatsEntry> entries() const {
    std::vector<GradStatsEntry> entries;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      entries.push_back({.count = tensors_[i].count(),
                         .grad = tensors_[i].const_operand(),
                         .loop = loops_[i] == nullptr ? StridedLoop{} : loops_[i]->loop()});
    }
    return entries;
  }

 private:
  std::vector<ListTensor> tensors_;
  std::vector<std::shared_ptr<LoopNumbers>> loops_;
};

struct GradStats {
  double norm = 0.0;
  std::vector<double> norms;
  double found_inf = 0.0;

  bool operator==(const GradStats& other) const {
    // Bit by bit: NaN equals itself.
    return std::memcmp(&norm, &other.norm, 8) == 0 && norms.size() == other.norms.size() &&
           std::memcmp(norms.data(), other.norms.data(), 8 * norms.size()) == 0 &&
           found_inf == other.found_inf;
  }
};

template <typename Run>
GradStats stats_of(const GradList& list, ScalarType norm_type, const Run& run) {
  const std::vector<GradStatsEntry> entries = list.entries();
  const auto count = static_cast<std::int64_t>(entries.size());
  const ListTensor norm(norm_type, 1);
  const ListTensor norms(norm_type, count);
  const ListTensor found_inf(ScalarType::kFloat32, 1);
  run(GradStatsParams{.entries = entries.data(),
                      .num_entries = count,
                      .norm_type = norm_type,
                      .norm = norm.operand().data,
                      .norms = norms.operand().data,
                      .found_inf = static_cast<float*>(found_inf.operand().data)});
  EXPECT_TRUE(norm.gaps_intact() && norms.gaps_intact() && found_inf.gaps_intact());
  GradStats stats{norm.get(0), {}, found_inf.get(0)};
  for (std::int64_t i = 0; i < count; ++i) stats.norms.push_back(norms.get(i));
  return stats;
}

void expect_near(double actual, double expected, double relative, const std::string& what) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << what << ": " << actual;
  } else if (std::isinf(expected)) {
    EXPECT_EQ(actual, expected) << what;
  } else {
    EXPECT_LE(std::fabs(actual - expected), relative * expected) << what;
  }
}

class GradientNorm : public KernelTest {
 protected:
  GradStats measure(const GradList& list, ScalarType norm_type = ScalarType::kFloat64,
                    const TaskRunner& runner = SerialTaskRunner()) const {
    return stats_of(list, norm_type, [&](const GradStatsParams& params) {
      GuardedBuffer workspace(kernel().grad_stats_workspace(params), GuardSide::kBack, 64);
      kernel().grad_stats(params, runner, workspace.data());
      EXPECT_TRUE(workspace.surroundings_intact());
    });
  }

  void check(const GradList& list) const {
    for (const ScalarType norm_type : {ScalarType::kFloat64, ScalarType::kFloat32}) {
      const GradStats actual = measure(list, norm_type);
      const GradStats expected = stats_of(
          list, norm_type, [](const GradStatsParams& params) { grad_stats_reference(params); });
      // Squares are added in double: what is left is the norm's own rounding.
      const double relative =
          norm_type == ScalarType::kFloat64 ? 1e-13 : 0x1p-23 + GetParam().norm_error;
      expect_near(actual.norm, expected.norm, relative, "norm of all");
      for (std::size_t i = 0; i < expected.norms.size(); ++i) {
        expect_near(actual.norms[i], expected.norms[i], relative, "entry " + std::to_string(i));
      }
      EXPECT_EQ(actual.found_inf, expected.found_inf);
    }
  }
};

GradList every_size(GuardSide side, std::int64_t shift) {
  GradList list;
  for (const ScalarType type : kListDtypes) {
    for (std::int64_t count = 0; count <= 70; ++count) {
      list.add(ListTensor(type, count, side, shift));
    }
  }
  return list;
}

TEST_P(GradientNorm, EverySize) {
  check(every_size(GuardSide::kBack, 0));
  for (const std::int64_t shift : {0, 1, 2, 4, 8, 20}) {
    check(every_size(GuardSide::kFront, shift));
  }
}

TEST_P(GradientNorm, BlocksAndPrefetching) {
  // Around a block of the list, and up to the guard page at the end of the last one.
  GradList list;
  for (const ScalarType type : kListDtypes) {
    for (const std::int64_t around : {kListBlock, 3 * kListBlock}) {
      for (const std::int64_t more : {-1, 0, 1, 37}) list.add(ListTensor(type, around + more));
    }
  }
  check(list);
}

TEST_P(GradientNorm, Strides) {
  GradList list;
  for (const ScalarType type : kListDtypes) {
    for (const auto& place : std::vector<ListPlace>{{{3, 18, 150}, {3000, 160, 1}},
                                                    {{3, 18, 150}, {2700, 1, 18}},
                                                    {{3, 18, 150}, {1, 3, 54}},
                                                    {{18, 150}, {300, 2}},
                                                    {{70}, {3}},
                                                    {{40, 50}, {0, 1}},
                                                    {{40, 50}, {0, 0}},
                                                    {{1, 1, 5}, {7, 9, 2}}}) {
      list.add(ListTensor(type, place), true);
    }
  }
  check(list);
}

TEST_P(GradientNorm, FindsOneBadElementAnywhere) {
  for (const ScalarType type : kListDtypes) {
    for (const double bad : {kInfinity, -kInfinity, kNan}) {
      for (const std::int64_t count : {1, 2, 31, 70, 300}) {
        GradList list;
        list.add(ListTensor(ScalarType::kFloat32, 5));
        const ListTensor grad = list.add(ListTensor(type, count));
        ASSERT_EQ(measure(list).found_inf, 0.0);
        for (std::int64_t i = 0; i < count; i += count / 70 + 1) {
          const double before = grad.get(i);
          grad.set(i, bad);
          const GradStats stats = measure(list);
          EXPECT_EQ(stats.found_inf, 1.0) << dtype_name(type) << " " << i << " of " << count;
          EXPECT_FALSE(std::isfinite(stats.norm));
          EXPECT_FALSE(std::isfinite(stats.norms[1]));
          EXPECT_TRUE(std::isfinite(stats.norms[0]));
          grad.set(i, before);
        }
      }
    }
  }
}

TEST_P(GradientNorm, InfinitiesOfBothSigns) {
  for (const ScalarType type : kListDtypes) {
    GradList list;
    const ListTensor grad = list.add(ListTensor(type, 40));
    grad.set(1, kInfinity);
    grad.set(2, -kInfinity);
    EXPECT_EQ(measure(list).norm, kInfinity);
    EXPECT_EQ(measure(list).found_inf, 1.0);
  }
}

TEST_P(GradientNorm, SquaresNeitherOverflowNorVanish) {
  for (const double magnitude : {3e38, 1e-38, 1e-45}) {
    GradList list;
    list.add(ListTensor(ScalarType::kFloat32, 70)).fill([&](std::int64_t) { return magnitude; });
    list.add(ListTensor(ScalarType::kFloat32, 3)).fill([](std::int64_t) { return 1e-30; });
    const GradStats stats = measure(list);
    EXPECT_EQ(stats.found_inf, 0.0);
    const double stored = static_cast<double>(static_cast<float>(magnitude));
    EXPECT_NEAR(stats.norms[0] / (stored * std::sqrt(70.0)), 1.0, 1e-12);
  }
  // Beyond the largest fp32 the norm of fp32 numbers is infinite, but nothing is said to be.
  GradList list;
  list.add(ListTensor(ScalarType::kFloat32, 70)).fill([](std::int64_t) { return 3e38; });
  const GradStats stats = measure(list, ScalarType::kFloat32);
  EXPECT_EQ(stats.norm, kInfinity);
  EXPECT_EQ(stats.found_inf, 0.0);
}

TEST_P(GradientNorm, DoublesWhoseSquaresOverflow) {
  for (const double magnitude : {1e155, 1e200, 1.7e308}) {
    GradList list;
    list.add(ListTensor(ScalarType::kFloat64, 7)).fill([&](std::int64_t) { return magnitude; });
    list.add(ListTensor(ScalarType::kFloat64, 30)).fill([](std::int64_t) { return 2.0; });
    list.add(ListTensor(ScalarType::kFloat32, 9));
    list.add(ListTensor(ScalarType::kFloat64, {{10, 9}, {1, 10}}), true).fill([](std::int64_t) {
      return 1e160;
    });
    check(list);
  }
}

TEST_P(GradientNorm, SmallTensorsBesideLargeOnes) {
  // Rounded to fp32 in between, the ones would vanish beside 1e6.
  GradList list;
  list.add(ListTensor(ScalarType::kFloat32, 1)).fill([](std::int64_t) { return 1e6; });
  list.add(ListTensor(ScalarType::kFloat32, 100)).fill([](std::int64_t) { return 1.0; });
  EXPECT_NEAR(measure(list).norm, std::sqrt(1e12 + 100.0), 1e-6 * 1e-3);
}

TEST_P(GradientNorm, EveryThreadCountGivesTheSameBits) {
  GradList list;
  for (const ScalarType type : kListDtypes) {
    list.add(ListTensor(type, 3 * kListBlock + 5));
    for (int i = 0; i < 100; ++i) list.add(ListTensor(type, 64));
    list.add(ListTensor(type, {{300, 200}, {1, 300}}), true);
    list.add(ListTensor(type, 150001));
  }
  for (const ScalarType norm_type : {ScalarType::kFloat64, ScalarType::kFloat32}) {
    const GradStats expected = measure(list, norm_type);
    for (int workers = 1; workers <= 7; ++workers) {
      EXPECT_TRUE(measure(list, norm_type, ThreadTaskRunner(workers, 3u + workers)) == expected)
          << workers << " threads";
      EXPECT_TRUE(measure(list, norm_type, ReversedTaskRunner(workers)) == expected)
          << workers << " workers in reverse";
    }
  }
}

TEST_P(GradientNorm, IsTheSameForEveryAddress) {
  GradList list;
  for (const std::int64_t shift : {0, 4, 12, 36}) {
    list.add(ListTensor(ScalarType::kFloat32, 10007, GuardSide::kFront, shift)).fill(99);
  }
  const GradStats stats = measure(list);
  for (const double norm : stats.norms) EXPECT_EQ(norm, stats.norms[0]);
}

TEST_P(GradientNorm, EmptyLists) {
  const GradStats none = measure({});
  EXPECT_EQ(none.norm, 0.0);
  EXPECT_EQ(none.found_inf, 0.0);
  GradList list;
  list.add(ListTensor(ScalarType::kFloat32, 0));
  list.add(ListTensor(ScalarType::kBFloat16, 0));
  const GradStats zeros = measure(list, ScalarType::kFloat32, ThreadTaskRunner(2));
  EXPECT_EQ(zeros.norm, 0.0);
  EXPECT_EQ(zeros.norms, (std::vector<double>{0.0, 0.0}));
  EXPECT_EQ(zeros.found_inf, 0.0);
}

TORCH_EXT_TEST_EACH_LIST_KERNEL(GradientNorm);

}  // namespace
}  // namespace torch_ext::testing
