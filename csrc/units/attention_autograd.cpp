// The derivatives of attention. One translation unit (csrc/README.md).
#include "ops/attention/attention_autograd_state.cpp"
#include "ops/attention/attention_backward_autograd.cpp"
#include "ops/attention/attention_backward_outputs.cpp"
#include "ops/attention/attention_forward_autograd.cpp"
#include "ops/attention/attention_second_order.cpp"
#include "ops/attention/functorch_node.cpp"
#include "ops/attention/packed_attention_autograd.cpp"
