#include "kernel_call.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "kernels/reference/element_access.h"

namespace torch_ext_bench {

using torch_ext::AttentionShape;
using torch_ext::element_size;
using torch_ext::KernelPath;

void OpenMpTaskRunner::run(torch_ext::WorkerBody body) const {
#pragma omp parallel num_threads(num_workers_)
  body(omp_get_thread_num());
}

double KernelCase::flops() const {
  double pairs = static_cast<double>(q_len) * static_cast<double>(kv_len);
  if (is_causal) {
    pairs = 0;
    for (std::int64_t i = 0; i < q_len; ++i) pairs += static_cast<double>(std::min(i + 1, kv_len));
  }
  const double products = measured == Measured::kForward ? 2 : 5;
  return 2.0 * products * static_cast<double>(batch * query_heads * head_dim) * pairs;
}

double KernelCase::kv_bytes() const {
  return 2.0 * static_cast<double>(batch * kv_heads * kv_len * head_dim) *
         static_cast<double>(element_size(dtype));
}

KernelCall::Buffer KernelCall::allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<char*>(memory), std::free);
}

KernelCall::Buffer KernelCall::random_elements(std::int64_t count) {
  Buffer buffer = allocate(static_cast<std::size_t>(count) * element_size(case_.dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    // The sum of four uniform numbers is near enough to a normal one.
    double sum = 0;
    for (int j = 0; j < 4; ++j) {
      random_state_ = random_state_ * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(random_state_ >> 40) / (1 << 24) - 0.5;
    }
    torch_ext::reference::store_element(buffer.get(), i, case_.dtype, sum * 1.7);
  }
  return buffer;
}

KernelCall::KernelCall(const KernelCase& kernel_case)
    : case_(kernel_case), workspace_(nullptr, std::free) {
  const KernelCase& c = case_;
  AttentionShape shape;
  shape.batch_sizes = {1, 1, 1, c.batch};
  shape.query_heads = c.query_heads;
  shape.kv_heads = c.kv_heads;
  shape.q_len = c.q_len;
  shape.kv_len = c.kv_len;
  shape.head_dim = shape.value_dim = c.head_dim;

  const auto filled = [&](auto view, std::int64_t heads, std::int64_t length) {
    buffers_.push_back(random_elements(c.batch * heads * length * c.head_dim));
    view.data = buffers_.back().get();
    view.batch_strides = {0, 0, 0, heads * length * c.head_dim};
    view.head_stride = length * c.head_dim;
    view.row_stride = c.head_dim;
    view.col_stride = 1;
    return view;
  };
  const std::int64_t rows = c.batch * c.query_heads * c.q_len;
  buffers_.push_back(allocate(static_cast<std::size_t>(rows) * sizeof(double)));
  void* logsumexp = buffers_.back().get();

  forward_.dtype = backward_.dtype = c.dtype;
  forward_.shape = backward_.shape = shape;
  forward_.scale = backward_.scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  forward_.masking.is_causal = backward_.masking.is_causal = c.is_causal;
  forward_.query = backward_.query = filled(torch_ext::ConstStridedView{}, c.query_heads, c.q_len);
  forward_.key = backward_.key = filled(torch_ext::ConstStridedView{}, c.kv_heads, c.kv_len);
  forward_.value = backward_.value = filled(torch_ext::ConstStridedView{}, c.kv_heads, c.kv_len);
  forward_.out = filled(torch_ext::StridedView{}, c.query_heads, c.q_len);
  forward_.logsumexp = logsumexp;
  if (c.measured == Measured::kForward) return;

  backward_.logsumexp = logsumexp;
  backward_.out.data = forward_.out.data;
  backward_.out.batch_strides = forward_.out.batch_strides;
  backward_.out.head_stride = forward_.out.head_stride;
  backward_.out.row_stride = forward_.out.row_stride;
  backward_.out.col_stride = forward_.out.col_stride;
  backward_.grad_out = filled(torch_ext::ConstStridedView{}, c.query_heads, c.q_len);
  backward_.grad_query = filled(torch_ext::StridedView{}, c.query_heads, c.q_len);
  backward_.grad_key = filled(torch_ext::StridedView{}, c.kv_heads, c.kv_len);
  backward_.grad_value = filled(torch_ext::StridedView{}, c.kv_heads, c.kv_len);
  // The backward pass reads what a forward pass wrote.
  const torch_ext::KernelTable& table = torch_ext::kernel_table();
  const torch_ext::SerialTaskRunner serial;
  table.attention_forward(forward_, serial,
                          workspace(table.attention_forward_workspace(forward_, 1)));
}

char* KernelCall::workspace(std::size_t bytes) {
  if (bytes > workspace_bytes_ || workspace_ == nullptr) {
    workspace_ = allocate(bytes);
    workspace_bytes_ = bytes;
  }
  return workspace_.get();
}

KernelPath KernelCall::run(const torch_ext::KernelTable& table,
                           const torch_ext::TaskRunner& runner) {
  const int workers = runner.num_workers();
  if (case_.measured == Measured::kForward) {
    return table.attention_forward(forward_, runner,
                                   workspace(table.attention_forward_workspace(forward_, workers)));
  }
  return table.attention_backward(
      backward_, runner, workspace(table.attention_backward_workspace(backward_, workers)));
}

}  // namespace torch_ext_bench
