// torch_ext::varlen_attention_forward and _backward on the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <limits>

#include "../../kernels/cpu/kernel_table.h"
#include "../attention/attention_arguments.h"
#include "../attention/attention_path.h"
#include "../task_runner_aten.h"
#include "../tensor_params.h"
#include "varlen_checks.h"
#include "varlen_lengths.h"
#include "varlen_outputs.h"
#include "varlen_signature.h"

namespace torch_ext {
namespace {

constexpr const char* kForwardOp = "varlen_attention_forward";
constexpr const char* kBackwardOp = "varlen_attention_backward";

// Scratch memory, 64-byte aligned, as large as the plan turns out.
class TensorWorkspace final : public Workspace {
 public:
  void* allocate(std::size_t bytes) const override {
    memory_ = c10::GetCPUAllocator()->allocate(bytes);
    return memory_.get();
  }

 private:
  mutable at::DataPtr memory_;
};

// A tensor ([pages,] rows, heads, columns) as the kernels see it.
template <typename View>
View rows_view(const at::Tensor& tensor, decltype(View::data) data) {
  View view;
  view.data = data;
  view.row_stride = tensor.stride(-3);
  view.head_stride = tensor.stride(-2);
  view.col_stride = tensor.stride(-1);
  return view;
}
ConstStridedView rows_of(const at::Tensor& tensor) {
  return rows_view<ConstStridedView>(tensor, tensor.const_data_ptr());
}
StridedView mutable_rows_of(const at::Tensor& tensor) {
  return tensor.defined() ? rows_view<StridedView>(tensor, tensor.mutable_data_ptr())
                          : StridedView{};
}

// The options that are tensors, in the types and layouts that kernels read.
struct OptionTensors {
  at::Tensor sink;

  explicit OptionTensors(const VarlenArguments& arguments) {
    if (const at::Tensor* given_sink = given(arguments.sink)) {
      sink = given_sink->to(accumulate_type(arguments.query.scalar_type())).contiguous();
    }
  }
};

AttentionShape shape_of(const VarlenArguments& arguments) {
  return {.query_heads = arguments.query.size(1),
          .kv_heads = arguments.key.size(-2),
          .head_dim = arguments.query.size(2),
          .value_dim = arguments.value.size(-1)};
}

ScoreTransform transform_of(const VarlenArguments& arguments, const OptionTensors& tensors) {
  const std::int64_t head_dim = arguments.query.size(2);
  const auto bound = [](std::int64_t size) { return size < 0 ? kUnbounded : size; };
  ScoreTransform transform{
      // Without a head_dim all scores are 0, and must not become 0 * inf.
      .scale = arguments.scale.value_or(
          head_dim == 0 ? 1.0 : 1.0 / std::sqrt(static_cast<double>(head_dim))),
      .softcap = arguments.softcap,
      .window = {.left = bound(arguments.window_size[0]), .right = bound(arguments.window_size[1])},
      .sink = tensors.sink.defined() ? tensors.sink.const_data_ptr() : nullptr};
  if (const at::Tensor* slopes = given(arguments.alibi_slopes)) {
    transform.alibi.data = slopes->const_data_ptr<float>();
    transform.alibi.head_stride = slopes->stride(-1);
    if (slopes->dim() == 2) {
      transform.alibi.batch_strides[kMaxBatchDims - 1] = slopes->stride(0);
    }
  }
  return transform;
}

AttentionDropout dropout_of(const VarlenArguments& arguments) {
  if (arguments.dropout_p == 0.0) return {};
  return {.probability = arguments.dropout_p,
          .seed = given(arguments.dropout_seed)->const_data_ptr<std::int64_t>()};
}

PagedRows pages_of(const VarlenArguments& arguments) {
  if (given(arguments.block_table) == nullptr) return {};
  return {.page_size = arguments.key.size(1),
          .key_page_stride = arguments.key.stride(0),
          .value_page_stride = arguments.value.stride(0)};
}

std::optional<ScalarType> stored_type(const VarlenArguments& arguments) {
  if (arguments.key.scalar_type() == at::kChar) return ScalarType::kInt8;
  if (arguments.key.scalar_type() == at::kFloat8_e4m3fn) return ScalarType::kFloat8E4M3;
  return std::nullopt;
}

void add_scales(const VarlenArguments& arguments, VarlenSequences& sequences) {
  const at::Tensor* k_scale = given(arguments.k_scale);
  const at::Tensor* v_scale = given(arguments.v_scale);
  if (k_scale == nullptr) return;
  sequences.key_scales = k_scale->const_data_ptr<float>();
  sequences.value_scales = v_scale->const_data_ptr<float>();
  sequences.key_scale_stride = k_scale->dim() == 0 ? 0 : k_scale->stride(0);
  sequences.value_scale_stride = v_scale->dim() == 0 ? 0 : v_scale->stride(0);
}

// Waking a thread costs a few microseconds: about as long as one core takes for 2^19 operations.
std::int64_t workers(const VarlenArguments& arguments, const VarlenSequences& sequences) {
  constexpr double kOperationsPerWorker = 1 << 19;
  double scores = 0.0;
  for (std::int64_t i = 0; i < sequences.count; ++i) {
    scores += static_cast<double>(sequences.q_len(i)) * static_cast<double>(sequences.kv_len(i));
  }
  const double columns = static_cast<double>(arguments.query.size(2) + arguments.value.size(-1));
  const double operations = 2.0 * scores * columns * static_cast<double>(arguments.query.size(1));
  return 1 + static_cast<std::int64_t>(operations / kOperationsPerWorker);
}

void zero_from(const at::Tensor& tensor, std::int64_t row) {
  if (tensor.defined() && row < tensor.size(0)) tensor.narrow(0, row, tensor.size(0) - row).zero_();
}

// Keys behind the used ones of their sequence have no gradient.
void zero_unused(const at::Tensor& grad, const VarlenSequences& sequences) {
  if (!grad.defined() || sequences.used_keys == nullptr) return;
  for (std::int64_t i = 0; i < sequences.count; ++i) {
    const std::int64_t first = sequences.first_key[i] + sequences.used_keys[i];
    const std::int64_t end = sequences.first_key[i + 1];
    if (first < end) grad.narrow(0, first, end - first).zero_();
  }
}

struct Cpu {
  static VarlenForwardResult forward(const VarlenArguments& arguments) {
    const VarlenSizes sizes = check_varlen(kForwardOp, arguments, SeedArgument::kRequired);
    const VarlenLengths lengths(kForwardOp, arguments);
    auto [out, logsumexp] = varlen_outputs(arguments, sizes);
    zero_from(out, lengths.end_of_queries());
    if (lengths.end_of_queries() < out.size(0)) {
      logsumexp.narrow(1, lengths.end_of_queries(), out.size(0) - lengths.end_of_queries())
          .fill_(-std::numeric_limits<double>::infinity());
    }
    if (lengths.end_of_queries() == 0 || out.size(1) == 0) {
      record_attention_path("cpu.empty");
      return {std::move(out), std::move(logsumexp)};
    }
    VarlenSequences sequences = lengths.sequences();
    const OptionTensors tensors(arguments);
    const AttentionForwardParams params{.dtype = kernel_scalar_type(arguments.query.scalar_type()),
                                        .shape = shape_of(arguments),
                                        .query = rows_of(arguments.query),
                                        .key = rows_of(arguments.key),
                                        .value = rows_of(arguments.value),
                                        .out = mutable_rows_of(out),
                                        .logsumexp = logsumexp.mutable_data_ptr(),
                                        .logsumexp_head_stride = out.size(0),
                                        .transform = transform_of(arguments, tensors),
                                        .dropout = dropout_of(arguments),
                                        .pages = pages_of(arguments),
                                        .stored_type = stored_type(arguments)};
    add_scales(arguments, sequences);
    const AtenTaskRunner runner(workers(arguments, sequences));
    record_attention_path(
        kernel_table().varlen_forward(params, sequences, runner, TensorWorkspace()));
    return {std::move(out), std::move(logsumexp)};
  }

  static VarlenBackwardResult backward(const VarlenArguments& arguments,
                                       const VarlenGradients& gradients) {
    const VarlenSizes sizes = check_varlen(kBackwardOp, arguments, SeedArgument::kRequired);
    check_varlen_gradients(kBackwardOp, arguments, gradients, sizes);
    const VarlenLengths lengths(kBackwardOp, arguments);
    const VarlenSequences sequences = lengths.sequences();
    VarlenBackwardResult grads = varlen_gradient_outputs(arguments, gradients.output_mask);
    auto& [grad_query, grad_key, grad_value, grad_sink] = grads;
    zero_from(grad_query, lengths.end_of_queries());
    for (const at::Tensor* grad : {&grad_key, &grad_value}) {
      zero_from(*grad, lengths.end_of_keys());
      zero_unused(*grad, sequences);
    }
    const at::ScalarType type = arguments.query.scalar_type();
    const at::Tensor grad_out = gradients.grad_out.to(type);
    const at::Tensor logsumexp = gradients.logsumexp.contiguous();
    at::Tensor grad_logsumexp;
    if (const at::Tensor* grad = given(gradients.grad_logsumexp)) {
      grad_logsumexp = grad->to(accumulate_type(type)).contiguous();
    }
    at::Tensor sink_parts;  // (sequences, heads)
    if (grad_sink.defined()) {
      sink_parts = at::empty({sequences.count, arguments.query.size(1)},
                             arguments.query.options().dtype(accumulate_type(type)));
      sink_parts.zero_();
    }
    const bool any =
        grad_query.defined() || grad_key.defined() || grad_value.defined() || grad_sink.defined();
    if (any && sequences.count > 0 && arguments.query.size(1) > 0) {
      const OptionTensors tensors(arguments);
      const AttentionBackwardParams params{
          .dtype = kernel_scalar_type(type),
          .shape = shape_of(arguments),
          .query = rows_of(arguments.query),
          .key = rows_of(arguments.key),
          .value = rows_of(arguments.value),
          .out = rows_of(gradients.out),
          .grad_out = rows_of(grad_out),
          .logsumexp = logsumexp.const_data_ptr(),
          .grad_logsumexp = grad_logsumexp.defined() ? grad_logsumexp.const_data_ptr() : nullptr,
          .logsumexp_head_stride = arguments.query.size(0),
          .grad_query = mutable_rows_of(grad_query),
          .grad_key = mutable_rows_of(grad_key),
          .grad_value = mutable_rows_of(grad_value),
          .grad_sink = sink_parts.defined() ? sink_parts.mutable_data_ptr() : nullptr,
          .transform = transform_of(arguments, tensors),
          .dropout = dropout_of(arguments)};
      const AtenTaskRunner runner(2 * workers(arguments, sequences));
      record_attention_path(
          kernel_table().varlen_backward(params, sequences, runner, TensorWorkspace()));
    } else {
      record_attention_path("cpu.empty");
    }
    if (grad_sink.defined()) grad_sink.copy_(sink_parts.sum(0));
    return grads;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("varlen_attention_forward", TORCH_FN(VarlenEntries<Cpu>::forward));
  m.impl("varlen_attention_backward", TORCH_FN(VarlenEntries<Cpu>::backward));
}

}  // namespace torch_ext
