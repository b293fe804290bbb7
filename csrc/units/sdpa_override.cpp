// The drop-in and the C++ functions. One translation unit (csrc/README.md).
#include "ops/attention/attention_functions.cpp"
#include "ops/attention/attention_path.cpp"
#include "ops/sdpa_override/sdpa_override_attention.cpp"
#include "ops/sdpa_override/sdpa_override_multi_head.cpp"
#include "ops/sdpa_override/sdpa_override_switch.cpp"
#include "ops/sdpa_override/sdpa_override_varlen.cpp"
#include "ops/sdpa_override/torch_backend_choice.cpp"
#include "ops/task_runner_aten.cpp"
