// What one mini-batch call is: lists of tensors to accumulate, measure or step, and the two weight
// gradients. Filled by csrc/ops, read by every kernel, on every device.
//
// Alphabet of the shape comments: tokens (flattened), out_features, in_features, num_embeddings,
// dim.
#pragma once

#include <cstdint>

#include "strided_view.h"

namespace torch_ext {

struct Operand {
  void* data = nullptr;
  ScalarType type = ScalarType::kFloat32;
};

struct ConstOperand {
  const void* data = nullptr;  // a scalar operand that is null counts as not given
  ScalarType type = ScalarType::kFloat32;
};

/// How the operands of an entry are walked together where they do not all lie in one piece in the
/// same order. Innermost last; strides in elements, (operands, dims), in the order in which the
/// entry declares its operands; those that are absent have any strides.
struct StridedLoop {
  std::int32_t dims = 0;  // 0: element i of each operand lies at data + i
  const std::int64_t* sizes = nullptr;
  const std::int64_t* strides = nullptr;
};

/// accumulator = beta * accumulator + scale * grad; beta = 0 never reads the accumulator.
struct AccumulateEntry {
  std::int64_t count = 0;
  Operand accumulator{};
  ConstOperand grad{};
  StridedLoop loop{};
};

struct AccumulateParams {
  const AccumulateEntry* entries = nullptr;
  std::int64_t num_entries = 0;
  double beta = 1.0;
  ConstOperand scale{};  // one element in the kernel's own memory; none: 1
};

/// norms[i] = ||grad i||, norm = ||all||, found_inf = 1 where any element is infinite or NaN.
struct GradStatsEntry {
  std::int64_t count = 0;
  ConstOperand grad{};
  StridedLoop loop{};
};

struct GradStatsParams {
  const GradStatsEntry* entries = nullptr;
  std::int64_t num_entries = 0;
  ScalarType norm_type = ScalarType::kFloat32;  // of norm and norms: kFloat32 or kFloat64
  void* norm = nullptr;
  void* norms = nullptr;  // (num_entries,)
  float* found_inf = nullptr;
};

/// What both optimizers share. gradient = coefficient * accumulator.
struct OptimizerSettings {
  double lr = 0.0;
  double weight_decay = 0.0;
  bool maximize = false;
  bool reset = true;           // accumulators become 0, also where found_inf skips the step
  ConstOperand coefficient{};  // one element; none: 1
  ConstOperand found_inf{};    // one element; not 0: nothing but the reset happens
  ConstOperand device_lr{};    // one element, for kernels whose memory the host cannot read: it
                               // takes lr's place; none: lr
};

struct AdamEntry {
  std::int64_t count = 0;
  Operand param{};
  Operand accumulator{};
  Operand exp_avg{};
  Operand exp_avg_sq{};
  Operand max_exp_avg_sq{};  // amsgrad only
  Operand master{};          // null: the param itself is updated; else the param becomes the
                             // master's rounding. Where it was not before, the master is the param
  StridedLoop loop{};        // of the six operands above
  Operand step{};            // one element, incremented
};

struct AdamParams {
  const AdamEntry* entries = nullptr;
  std::int64_t num_entries = 0;
  OptimizerSettings settings{};
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  bool decoupled = true;  // AdamW's weight decay; false: Adam's, added to the gradient
  bool amsgrad = false;
};

struct SgdEntry {
  std::int64_t count = 0;
  Operand param{};
  Operand accumulator{};
  Operand momentum_buffer{};  // null without momentum
  Operand master{};
  StridedLoop loop{};       // of the four operands above
  bool first_step = false;  // momentum_buffer is written, not read
};

struct SgdParams {
  const SgdEntry* entries = nullptr;
  std::int64_t num_entries = 0;
  OptimizerSettings settings{};
  double momentum = 0.0;
  double dampening = 0.0;
  bool nesterov = false;
};

/// A (rows, cols) matrix with any strides, in elements.
template <typename Pointer>
struct BasicMatrix {
  Pointer data = nullptr;
  ScalarType type = ScalarType::kFloat32;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 0;
};

using Matrix = BasicMatrix<void*>;
using ConstMatrix = BasicMatrix<const void*>;

/// weight_grad = beta * weight_grad + grad_output^T input, and bias_grad = beta * bias_grad + the
/// sum of grad_output's rows where it is given.
struct WeightGradientParams {
  std::int64_t tokens = 0;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  Matrix weight_grad{};  // (out_features, in_features)
  Operand bias_grad{};   // (out_features)
  std::int64_t bias_stride = 1;
  ConstMatrix grad_output{};  // (tokens, out_features)
  ConstMatrix input{};        // (tokens, in_features)
  double beta = 1.0;
};

/// weight_grad = beta * weight_grad + the sum, for each row, of grad_output's rows that name it.
struct EmbeddingGradientParams {
  std::int64_t num_embeddings = 0;
  std::int64_t dim = 0;
  Matrix weight_grad{};       // (num_embeddings, dim)
  ConstMatrix grad_output{};  // (tokens, dim)
  /// The rows that are named, in increasing order, and for row r the tokens positions[starts[r]]
  /// ... positions[starts[r + 1] - 1] that name it, in increasing order.
  std::int64_t num_rows = 0;
  const std::int64_t* rows = nullptr;       // (num_rows,)
  const std::int64_t* starts = nullptr;     // (num_rows + 1,)
  const std::int64_t* positions = nullptr;  // (starts[num_rows],)
  bool scale_by_frequency = false;          // each row's sum is divided by its number of tokens
  double beta = 1.0;
};

}  // namespace torch_ext
