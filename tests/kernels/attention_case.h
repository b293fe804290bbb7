// One attention problem in a few words, and the tensors made of it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "kernels/attention_params.h"
#include "strided_tensor.h"

namespace torch_ext::testing {

enum class MaskPattern {
  kRandom,    // each pair with probability `density`
  kFull,      // every pair attends
  kEmpty,     // no pair does
  kWindow,    // |query - key| < window
  kBlocks,    // 32 x 32 blocks, each full or empty with probability `density`
  kHalfRows,  // odd queries attend to nothing, even ones to everything
};

struct MaskSpec {
  AttentionMaskKind kind = AttentionMaskKind::kNone;
  MaskPattern pattern = MaskPattern::kRandom;
  ScalarType dtype = ScalarType::kFloat32;  // of an additive mask
  Layout layout = Layout::kBhsd;
  Broadcast broadcast{};
  double density = 0.7;
  std::int64_t window = 16;
  /// What an additive mask adds to pairs that do not attend; the others get a random bias.
  double excluded = -std::numeric_limits<double>::infinity();
};

struct AttentionCase {
  ScalarType dtype = ScalarType::kFloat32;
  std::array<std::int64_t, kMaxBatchDims> batch_sizes{1, 1, 1, 1};
  std::int64_t query_heads = 2;
  std::int64_t kv_heads = 2;
  std::int64_t q_len = 8;
  std::int64_t kv_len = 8;
  std::int64_t head_dim = 16;
  std::int64_t value_dim = -1;  // -1: head_dim
  Layout layout = Layout::kBhsd;
  Layout grad_out_layout = Layout::kBhsd;
  bool packed = false;  // query, key and value share rows; so do their gradients
  GuardSide guard = GuardSide::kBack;
  double scale = std::numeric_limits<double>::quiet_NaN();  // NaN: 1 / sqrt(head_dim)
  MaskSpec mask{};
  double key_padding = 0.0;         // share of the keys that are ignored; 0: no such tensor
  bool key_padding_shared = false;  // one row for every batch
  bool is_causal = false;
  std::int64_t causal_offset = 0;  // of the window and of ALiBi, too
  std::int64_t window_left = kUnbounded;
  std::int64_t window_right = kUnbounded;  // without is_causal
  double softcap = 0.0;
  bool alibi = false;
  bool alibi_varies = false;  // from batch to batch
  bool sink = false;
  double dropout = 0.0;
  std::int64_t seed = 1;
  bool wants_logsumexp = true;
  bool has_grad_logsumexp = false;
  bool wants_grad_mask = false;
  bool unrounded_grads = false;  // of query, key and value: float for 16-bit types; not packed
  bool forward_only = false;
  double magnitude = 1.0;         // standard deviation of query and key
  double tolerance_factor = 1.0;  // on the error bounds of the dtype; not for large scores
};

/// The window that a case's fields say.
KeyWindow window_of(const AttentionCase& spec);

/// "f32 q8 kv8 d16 ..." with what differs from the default.
std::string describe(const AttentionCase& spec);

/// The tensors of a case, filled with random numbers; outputs poisoned.
class AttentionProblem {
 public:
  explicit AttentionProblem(const AttentionCase& spec);

  /// The same inputs in float64, contiguous, for the reference; the masks are shared.
  AttentionProblem as_float64() const;
  /// The same inputs, outputs of its own.
  AttentionProblem with_new_outputs() const;

  AttentionForwardParams forward_params() const;
  AttentionBackwardParams backward_params() const;

  /// Number of pairs that take part, by rules written down a second time.
  std::int64_t count_attended_pairs() const;
  bool attends(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col) const;

  AttentionCase spec;
  AttentionShape shape{};
  double scale = 1.0;
  StridedTensor query, key, value, out, logsumexp;
  StridedTensor grad_out, grad_logsumexp, grad_query, grad_key, grad_value, grad_mask;
  StridedTensor mask, key_padding;
  StridedTensor alibi, sink, grad_sink;

 private:
  AttentionProblem() = default;
  void make_shape();
  void make_inputs();
  void make_outputs();
  void make_masks();
  void make_modifiers();
  TensorExtent extent(std::int64_t heads, std::int64_t rows, std::int64_t cols) const;
};

}  // namespace torch_ext::testing
