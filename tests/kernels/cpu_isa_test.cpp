#include "kernels/cpu/cpu_isa.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernel_table.h"

namespace torch_ext {
namespace {

constexpr const char* kVariable = "TORCH_EXT_CPU_CAPABILITY";

const std::vector<CpuCapability> kAll{CpuCapability::kDefault, CpuCapability::kAvx2,
                                      CpuCapability::kAvx512, CpuCapability::kAvx512Bf16};

std::string message_of_parsing(std::string_view name) {
  try {
    parse_capability(name);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(CpuCapability, NamesParseBack) {
  const std::vector<std::string> names{"default", "avx2", "avx512", "avx512_bf16"};
  for (std::size_t i = 0; i < kAll.size(); ++i) {
    EXPECT_EQ(capability_name(kAll[i]), names[i]);
    EXPECT_EQ(parse_capability(names[i]), kAll[i]);
  }
}

TEST(CpuCapability, UnknownNamesAreRefusedWithTheKnownOnes) {
  for (const char* name : {"", "avx", "AVX2", "avx2 ", "avx512bf16", "sse4"}) {
    const std::string message = message_of_parsing(name);
    EXPECT_NE(message.find(std::string("'") + name + "'"), std::string::npos) << message;
    for (const CpuCapability capability : kAll) {
      EXPECT_NE(message.find(capability_name(capability)), std::string::npos) << message;
    }
  }
}

/// Restores the capability in use.
class CapabilityInUse : public ::testing::Test {
 protected:
  void TearDown() override { set_capability(before_); }

 private:
  CpuCapability before_ = current_capability();
};

TEST_F(CapabilityInUse, FollowsSetCapability) {
  for (const CpuCapability capability : kAll) {
    if (capability > supported_capability()) continue;
    set_capability(capability);
    EXPECT_EQ(current_capability(), capability);
    EXPECT_EQ(kernel_table().capability, capability);
    EXPECT_EQ(&kernel_table(), &kernel_table(capability));
  }
}

TEST_F(CapabilityInUse, RefusesWhatTheMachineLacks) {
  const CpuCapability before = current_capability();
  int refused = 0;
  for (const CpuCapability capability : kAll) {
    if (capability <= supported_capability()) continue;
    ++refused;
    try {
      set_capability(capability);
      ADD_FAILURE() << capability_name(capability) << " was accepted";
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(capability_name(capability)), std::string::npos) << message;
      EXPECT_NE(message.find(capability_name(supported_capability())), std::string::npos)
          << message;
    }
    EXPECT_EQ(current_capability(), before);
  }
  EXPECT_EQ(refused, static_cast<int>(CpuCapability::kAvx512Bf16) -
                         static_cast<int>(supported_capability()));
}

TEST_F(CapabilityInUse, EveryTableIsWhole) {
  for (const CpuCapability capability : kAll) {
    const KernelTable& table = kernel_table(capability);
    EXPECT_EQ(table.capability, capability);
    EXPECT_NE(table.attention_forward_workspace, nullptr);
    EXPECT_NE(table.attention_forward, nullptr);
    EXPECT_NE(table.attention_backward_workspace, nullptr);
    EXPECT_NE(table.attention_backward, nullptr);
  }
}

/// The variable is read once per process: each value gets a process of its own.
class CapabilityVariable : public ::testing::Test {
 protected:
  void SetUp() override { ::testing::GTEST_FLAG(death_test_style) = "threadsafe"; }
};

[[noreturn]] void exit_with_capability(const char* value) {
  if (value == nullptr) {
    unsetenv(kVariable);
  } else {
    setenv(kVariable, value, 1);
  }
  try {
    // What the variable is for: the kernels that calls take.
    AttentionForwardParams nothing;
    const char* path = kernel_table().attention_forward(nothing, SerialTaskRunner(), nullptr);
    std::fprintf(stderr, "%s %s\n", path,
                 std::string(capability_name(current_capability())).c_str());
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "refused: %s\n", error.what());
    std::exit(3);
  }
  std::exit(0);
}

std::string path_and_name(CpuCapability capability) {
  const std::string name(capability_name(capability));
  return "cpu\\." + name + "\\.[a-z]+ " + name + "\n";
}

TEST_F(CapabilityVariable, Unset) {
  EXPECT_EXIT(exit_with_capability(nullptr), ::testing::ExitedWithCode(0),
              path_and_name(supported_capability()));
}

TEST_F(CapabilityVariable, EmptyIsUnset) {
  EXPECT_EXIT(exit_with_capability(""), ::testing::ExitedWithCode(0),
              path_and_name(supported_capability()));
}

TEST_F(CapabilityVariable, Limits) {
  for (const CpuCapability capability : kAll) {
    const CpuCapability expected = std::min(capability, supported_capability());
    const std::string name(capability_name(capability));
    EXPECT_EXIT(exit_with_capability(name.c_str()), ::testing::ExitedWithCode(0),
                path_and_name(expected));
  }
}

TEST_F(CapabilityVariable, NamingNoCapabilityIsRefused) {
  EXPECT_EXIT(exit_with_capability("avx1024"), ::testing::ExitedWithCode(3),
              "refused: .*avx512_bf16.*avx1024");
}

}  // namespace
}  // namespace torch_ext
