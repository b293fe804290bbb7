// The mini-batch kernels on a GPU as one more column of kernels: they pass the tests of the others.
#if defined(TORCH_EXT_CUDA_TESTS)
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device_mirror.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cuda/accumulation_kernels.h"

namespace torch_ext::testing {

extern const KernelTable kDeviceListKernels;

namespace {

// Calls `body(operand, place in the loop)` for each operand of an entry; places < 0: one element.
template <typename Body>
void visit(AccumulateEntry& entry, const Body& body) {
  body(entry.accumulator, 0);
  body(entry.grad, 1);
}
template <typename Body>
void visit(GradStatsEntry& entry, const Body& body) {
  body(entry.grad, 0);
}
template <typename Body>
void visit(AdamEntry& entry, const Body& body) {
  body(entry.param, 0);
  body(entry.accumulator, 1);
  body(entry.exp_avg, 2);
  body(entry.exp_avg_sq, 3);
  body(entry.max_exp_avg_sq, 4);
  body(entry.master, 5);
  body(entry.step, -1);
}
template <typename Body>
void visit(SgdEntry& entry, const Body& body) {
  body(entry.param, 0);
  body(entry.accumulator, 1);
  body(entry.momentum_buffer, 2);
  body(entry.master, 3);
}

template <typename Entry>
std::int64_t elements_of(const Entry& entry, int place) {
  if (place < 0) return 1;
  const StridedLoop& loop = entry.loop;
  if (entry.count == 0 || loop.dims == 0) return entry.count;
  std::int64_t last = 0;
  for (int dim = 0; dim < loop.dims; ++dim) {
    last += (loop.sizes[dim] - 1) * loop.strides[place * loop.dims + dim];
  }
  return last + 1;
}

/// A call's params with everything on the device.
template <typename Params, typename Entry>
class DeviceCall {
 public:
  explicit DeviceCall(const Params& host)
      : params(host), entries_(host.entries, host.entries + host.num_entries) {
    for (Entry& entry : entries_) {
      visit(entry, [&](const auto& operand, int place) {
        const std::size_t width = element_size(operand.type);
        mirror.add(operand.data, static_cast<std::size_t>(elements_of(entry, place)) * width,
                   width);
      });
    }
    params.entries = entries_.data();
  }

  void add(const ConstOperand& scalar) {
    const std::size_t width = element_size(scalar.type);
    mirror.add(scalar.data, width, width);
  }

  void upload() {
    mirror.upload();
    for (Entry& entry : entries_) {
      visit(entry, [&](auto& operand, int) { operand.data = mirror.at(operand.data); });
    }
  }

  void move(ConstOperand& scalar) { scalar.data = mirror.at(scalar.data); }

  Params params;
  DeviceMirror mirror;

 private:
  std::vector<Entry> entries_;
};

void accumulate(const AccumulateParams& params, const TaskRunner&) {
  DeviceCall<AccumulateParams, AccumulateEntry> call(params);
  call.add(params.scale);
  call.upload();
  call.move(call.params.scale);
  check_cuda(cuda::accumulate(call.params, nullptr), "accumulate");
  call.mirror.download();
}

std::size_t grad_stats_workspace(const GradStatsParams& params) {
  return cuda::grad_stats_workspace(params);
}

void grad_stats(const GradStatsParams& params, const TaskRunner&, void* workspace) {
  DeviceCall<GradStatsParams, GradStatsEntry> call(params);
  const std::size_t width = element_size(params.norm_type);
  call.mirror.add(params.norm, width, width);
  call.mirror.add(params.norms, static_cast<std::size_t>(params.num_entries) * width, width);
  call.mirror.add(params.found_inf, sizeof(float), sizeof(float));
  call.mirror.add(workspace, cuda::grad_stats_workspace(params), 16);
  call.upload();
  call.params.norm = call.mirror.at(params.norm);
  call.params.norms = call.mirror.at(params.norms);
  call.params.found_inf = call.mirror.at(params.found_inf);
  check_cuda(cuda::grad_stats(call.params, call.mirror.at(workspace), nullptr), "grad_stats");
  call.mirror.download();
}

template <typename Params, typename Entry, typename Run>
void step(const Params& params, std::size_t workspace_bytes, const Run& run) {
  DeviceCall<Params, Entry> call(params);
  call.add(params.settings.coefficient);
  call.add(params.settings.found_inf);
  std::vector<double> workspace(workspace_bytes / sizeof(double) + 1);
  call.mirror.add(workspace.data(), workspace_bytes, 16);
  call.upload();
  call.move(call.params.settings.coefficient);
  call.move(call.params.settings.found_inf);
  check_cuda(run(call.params, call.mirror.at(workspace.data())), "step");
  call.mirror.download();
}

void adam_step(const AdamParams& params, const TaskRunner&) {
  step<AdamParams, AdamEntry>(params, cuda::adam_step_workspace(params),
                              [](const AdamParams& device, void* workspace) {
                                return cuda::adam_step(device, workspace, nullptr);
                              });
}

void sgd_step(const SgdParams& params, const TaskRunner&) {
  step<SgdParams, SgdEntry>(
      params, 0, [](const SgdParams& device, void*) { return cuda::sgd_step(device, nullptr); });
}

template <typename AnyMatrix>
std::size_t matrix_bytes(const AnyMatrix& matrix, std::int64_t rows, std::int64_t cols) {
  if (rows == 0 || cols == 0) return 0;
  const std::int64_t last = (rows - 1) * matrix.row_stride + (cols - 1) * matrix.col_stride;
  return static_cast<std::size_t>(last + 1) * element_size(matrix.type);
}

void embedding_gradient(const EmbeddingGradientParams& params, const TaskRunner&) {
  std::vector<std::int64_t> rows;
  std::int64_t tokens = 0;  // of grad_output, those that were left out among them
  for (std::int64_t i = 0; i < params.num_rows; ++i) {
    for (std::int64_t k = params.starts[i]; k < params.starts[i + 1]; ++k) {
      rows.push_back(params.rows[i]);
      tokens = params.positions[k] < tokens ? tokens : params.positions[k] + 1;
    }
  }
  cuda::SortedEmbeddingGradient sorted{.gradient = params,
                                       .tokens = static_cast<std::int64_t>(rows.size())};
  const std::size_t index_bytes = rows.size() * sizeof(std::int64_t);
  const std::size_t workspace_bytes = cuda::embedding_gradient_workspace(sorted);
  std::vector<double> workspace(workspace_bytes / sizeof(double) + 1);
  DeviceMirror mirror;
  mirror.add(params.weight_grad.data,
             matrix_bytes(params.weight_grad, params.num_embeddings, params.dim),
             element_size(params.weight_grad.type));
  mirror.add(params.grad_output.data, matrix_bytes(params.grad_output, tokens, params.dim),
             element_size(params.grad_output.type));
  mirror.add(rows.data(), index_bytes, sizeof(std::int64_t));
  mirror.add(params.positions, index_bytes, sizeof(std::int64_t));
  mirror.add(workspace.data(), workspace_bytes, 16);
  mirror.upload();
  sorted.gradient.weight_grad.data = mirror.at(params.weight_grad.data);
  sorted.gradient.grad_output.data = mirror.at(params.grad_output.data);
  sorted.sorted_rows = mirror.at(rows.data());
  sorted.positions = mirror.at(params.positions);
  check_cuda(cuda::embedding_gradient(sorted, mirror.at(workspace.data()), nullptr), "embedding");
  mirror.download();
}

}  // namespace

constinit const KernelTable kDeviceListKernels{
    .capability = CpuCapability::kDefault,
    .attention_forward_workspace = nullptr,
    .attention_forward = nullptr,
    .attention_backward_workspace = nullptr,
    .attention_backward = nullptr,
    .accumulate = accumulate,
    .grad_stats_workspace = grad_stats_workspace,
    .grad_stats = grad_stats,
    .adam_step = adam_step,
    .sgd_step = sgd_step,
    .weight_gradient_workspace = nullptr,
    .weight_gradient = nullptr,
    .embedding_gradient = embedding_gradient,
};

}  // namespace torch_ext::testing
#endif
