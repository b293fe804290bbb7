// What the override of aten::_native_multi_head_attention needs of libtorch_cuda.
#include "sdpa_override_kernels.h"

namespace torch_ext {
namespace {

// Before anybody can call enable().
[[maybe_unused]] const bool is_set = [] {
  torch_cuda_multi_head_attention = &at::native::native_multi_head_attention_cuda;
  return true;
}();

}  // namespace
}  // namespace torch_ext
