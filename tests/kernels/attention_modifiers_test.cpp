// Windows, soft caps, ALiBi and sinks against the reference.
#include <gtest/gtest.h>

#include "attention_case_list.h"
#include "attention_check.h"
#include "kernels_under_test.h"

namespace torch_ext::testing {
namespace {

class AttentionModifiers : public AttentionKernelTest {
 protected:
  void check(CaseList (*cases)(ScalarType)) const {
    for (const ScalarType dtype : kAllDtypes) {
      check_cases(kernel(), thinned(cases(dtype)), /*forward_only=*/false);
    }
  }
};

TEST_P(AttentionModifiers, WindowsOfAnySide) { check(window_cases); }
TEST_P(AttentionModifiers, Sinks) { check(sink_cases); }
TEST_P(AttentionModifiers, SoftCaps) { check(softcap_cases); }
TEST_P(AttentionModifiers, Alibi) { check(alibi_cases); }

TEST_P(AttentionModifiers, AnyOfThemTogether) {
  check_cases(kernel(), thinned(random_modified_cases(13, 400)), /*forward_only=*/false);
}

TORCH_EXT_TEST_EACH_ISA(AttentionModifiers);

}  // namespace
}  // namespace torch_ext::testing
