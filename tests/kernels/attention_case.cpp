#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace torch_ext::testing {
namespace {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
      return "f32";
    case ScalarType::kFloat64:
      return "f64";
    case ScalarType::kBFloat16:
      return "bf16";
    case ScalarType::kFloat16:
      return "f16";
    case ScalarType::kBool:
      return "bool";
  }
  return "?";
}

const char* pattern_name(MaskPattern pattern) {
  switch (pattern) {
    case MaskPattern::kRandom:
      return "random";
    case MaskPattern::kFull:
      return "full";
    case MaskPattern::kEmpty:
      return "empty";
    case MaskPattern::kWindow:
      return "window";
    case MaskPattern::kBlocks:
      return "blocks";
    case MaskPattern::kHalfRows:
      return "half_rows";
  }
  return "?";
}

std::uint64_t mix(std::uint64_t state) {  // splitmix64
  state += 0x9E3779B97F4A7C15u;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

/// Uniform in [0, 1), the same for the same place.
double uniform_at(std::uint64_t seed, std::int64_t a, std::int64_t b, std::int64_t c,
                  std::int64_t d) {
  std::uint64_t state = mix(seed);
  for (const std::int64_t index : {a, b, c, d}) {
    state = state * 0xD1342543DE82EF95u + static_cast<std::uint64_t>(index);
  }
  return static_cast<double>(mix(state) >> 11) * 0x1p-53;
}

/// Nearly normal: the sum of four uniform numbers, of deviation 1. A case needs millions of them,
/// and std::normal_distribution took longer than the reference.
class NormalNumbers {
 public:
  explicit NormalNumbers(std::uint64_t seed) : state_(mix(seed)) {}

  double next() {
    const std::uint64_t bits = mix(state_++);
    const std::uint64_t sum =
        (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
    return (static_cast<double>(sum) * 0x1p-16 - 2.0) * 1.7320508075688772;
  }

 private:
  std::uint64_t state_;
};

bool pattern_attends(const MaskSpec& mask, std::uint64_t seed, std::int64_t batch,
                     std::int64_t head, std::int64_t row, std::int64_t col) {
  switch (mask.pattern) {
    case MaskPattern::kRandom:
      return uniform_at(seed, batch, head, row, col) < mask.density;
    case MaskPattern::kFull:
      return true;
    case MaskPattern::kEmpty:
      return false;
    case MaskPattern::kWindow:
      return std::abs(row - col) < mask.window;
    case MaskPattern::kBlocks:
      return uniform_at(seed, batch, head, row / 32, col / 32) < mask.density;
    case MaskPattern::kHalfRows:
      return row % 2 == 0;
  }
  return true;
}

void fill_normal(StridedTensor& tensor, double deviation, std::uint64_t seed) {
  NormalNumbers normal(seed);
  tensor.fill([&](auto, auto, auto, auto) { return deviation * normal.next(); });
}

}  // namespace

std::string describe(const AttentionCase& spec) {
  std::ostringstream text;
  text << dtype_name(spec.dtype) << " batch";
  for (const std::int64_t size : spec.batch_sizes) {
    if (size != 1) text << " " << size;
  }
  text << " heads " << spec.query_heads << "/" << spec.kv_heads << " q_len " << spec.q_len
       << " kv_len " << spec.kv_len << " head_dim " << spec.head_dim;
  if (spec.value_dim >= 0) text << " value_dim " << spec.value_dim;
  if (spec.packed) text << " packed";
  text << " layout " << layout_name(spec.layout) << " grad_out "
       << layout_name(spec.grad_out_layout);
  if (!std::isnan(spec.scale)) text << " scale " << spec.scale;
  if (spec.mask.kind != AttentionMaskKind::kNone) {
    text << (spec.mask.kind == AttentionMaskKind::kBoolean ? " boolean" : " additive") << " mask "
         << pattern_name(spec.mask.pattern) << " " << dtype_name(spec.mask.dtype) << " "
         << layout_name(spec.mask.layout) << " broadcast";
    if (spec.mask.broadcast.batch) text << " batch";
    if (spec.mask.broadcast.heads) text << " heads";
    if (spec.mask.broadcast.rows) text << " rows";
    if (spec.mask.broadcast.cols) text << " cols";
    for (int dim = 0; dim < kMaxBatchDims; ++dim) {
      if (spec.mask.broadcast.batch_dims[dim]) text << " batch_dim " << dim;
    }
    if (spec.mask.pattern == MaskPattern::kWindow) text << " window " << spec.mask.window;
    if (spec.mask.pattern == MaskPattern::kRandom || spec.mask.pattern == MaskPattern::kBlocks) {
      text << " density " << spec.mask.density;
    }
    text << " excluded " << spec.mask.excluded;
  }
  if (spec.key_padding > 0.0) {
    text << (spec.key_padding_shared ? " shared" : "") << " key_padding " << spec.key_padding;
  }
  if (spec.is_causal) text << " causal " << spec.causal_offset;
  if (spec.window_left != kUnbounded) text << " left " << spec.window_left;
  if (spec.window_right != kUnbounded) text << " right " << spec.window_right;
  if (!spec.is_causal && spec.causal_offset != 0) text << " offset " << spec.causal_offset;
  if (spec.softcap > 0.0) text << " softcap " << spec.softcap;
  if (spec.alibi) text << (spec.alibi_varies ? " alibi of batches" : " alibi");
  if (spec.sink) text << " sink";
  if (spec.dropout > 0.0) text << " dropout " << spec.dropout;
  if (spec.has_grad_logsumexp) text << " grad_logsumexp";
  if (spec.wants_grad_mask) text << " grad_mask";
  if (spec.unrounded_grads) text << " unrounded";
  if (spec.magnitude != 1.0) text << " magnitude " << spec.magnitude;
  if (spec.guard == GuardSide::kFront) text << " guard front";
  text << " seed " << spec.seed;
  return text.str();
}

AttentionProblem::AttentionProblem(const AttentionCase& attention_case) : spec(attention_case) {
  make_shape();
  make_inputs();
  make_masks();
  make_modifiers();
  make_outputs();
}

void AttentionProblem::make_shape() {
  shape.batch_sizes = spec.batch_sizes;
  shape.query_heads = spec.query_heads;
  shape.kv_heads = spec.kv_heads;
  shape.q_len = spec.q_len;
  shape.kv_len = spec.kv_len;
  shape.head_dim = spec.head_dim;
  shape.value_dim = spec.value_dim < 0 ? spec.head_dim : spec.value_dim;
  scale = std::isnan(spec.scale)
              ? 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(shape.head_dim, 1)))
              : spec.scale;
}

TensorExtent AttentionProblem::extent(std::int64_t heads, std::int64_t rows,
                                      std::int64_t cols) const {
  return {shape.batch_sizes, heads, rows, cols};
}

namespace {

/// query, key and value as windows of one (batch, row, heads...) buffer.
struct PackedTensors {
  StridedTensor query, key, value;
};

PackedTensors make_packed(const AttentionShape& shape, ScalarType dtype, GuardSide guard) {
  const std::int64_t key_offset = shape.query_heads * shape.head_dim;
  const std::int64_t value_offset = key_offset + shape.kv_heads * shape.head_dim;
  const std::int64_t row_stride = value_offset + shape.kv_heads * shape.value_dim;
  const std::int64_t rows = std::max(shape.q_len, shape.kv_len);
  StridedView strides{};
  std::int64_t step = rows * row_stride;
  for (int dim = kMaxBatchDims - 1; dim >= 0; --dim) {
    strides.batch_strides[dim] = step;
    step *= shape.batch_sizes[dim];
  }
  strides.row_stride = row_stride;
  strides.col_stride = 1;
  auto storage =
      std::make_shared<GuardedBuffer>(static_cast<std::size_t>(step) * element_size(dtype), guard);

  const auto window = [&](std::int64_t heads, std::int64_t len, std::int64_t dim,
                          std::int64_t offset) {
    StridedView view = strides;
    view.head_stride = dim;
    return StridedTensor(dtype, {shape.batch_sizes, heads, len, dim}, storage, view, offset);
  };
  return {window(shape.query_heads, shape.q_len, shape.head_dim, 0),
          window(shape.kv_heads, shape.kv_len, shape.head_dim, key_offset),
          window(shape.kv_heads, shape.kv_len, shape.value_dim, value_offset)};
}

}  // namespace

void AttentionProblem::make_inputs() {
  if (spec.packed) {
    PackedTensors packed = make_packed(shape, spec.dtype, spec.guard);
    query = packed.query;
    key = packed.key;
    value = packed.value;
  } else {
    const auto make = [&](std::int64_t heads, std::int64_t rows, std::int64_t cols) {
      return StridedTensor(spec.dtype, extent(heads, rows, cols), spec.layout, spec.guard);
    };
    query = make(shape.query_heads, shape.q_len, shape.head_dim);
    key = make(shape.kv_heads, shape.kv_len, shape.head_dim);
    value = make(shape.kv_heads, shape.kv_len, shape.value_dim);
  }
  grad_out = StridedTensor(spec.dtype, extent(shape.query_heads, shape.q_len, shape.value_dim),
                           spec.grad_out_layout, spec.guard);
  const auto seed = static_cast<std::uint64_t>(spec.seed);
  fill_normal(query, spec.magnitude, 16 * seed);
  fill_normal(key, spec.magnitude, 16 * seed + 1);
  fill_normal(value, 1.0, 16 * seed + 2);
  fill_normal(grad_out, 1.0, 16 * seed + 3);
  if (spec.has_grad_logsumexp) {
    const ScalarType type =
        spec.dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
    grad_logsumexp = StridedTensor(type, extent(shape.query_heads, shape.q_len, 1));
    fill_normal(grad_logsumexp, 1.0, 16 * seed + 4);
  }
}

void AttentionProblem::make_masks() {
  const auto seed = static_cast<std::uint64_t>(spec.seed);
  if (spec.mask.kind != AttentionMaskKind::kNone) {
    const bool boolean = spec.mask.kind == AttentionMaskKind::kBoolean;
    mask = StridedTensor(boolean ? ScalarType::kBool : spec.mask.dtype,
                         extent(shape.query_heads, shape.q_len, shape.kv_len), spec.mask.layout,
                         spec.guard, spec.mask.broadcast);
    NormalNumbers normal(16 * seed + 5);
    mask.fill([&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t col) {
      const bool attended = pattern_attends(spec.mask, seed, batch, head, row, col);
      if (boolean) return attended ? 1.0 : 0.0;
      return attended ? normal.next() : spec.mask.excluded;
    });
  }
  if (spec.key_padding > 0.0) {
    Broadcast broadcast;
    broadcast.batch = spec.key_padding_shared;
    key_padding = StridedTensor(ScalarType::kBool, extent(1, 1, shape.kv_len), Layout::kBhsd,
                                spec.guard, broadcast);
    key_padding.fill([&](std::int64_t batch, std::int64_t, std::int64_t, std::int64_t col) {
      return uniform_at(seed + 77, batch, 0, 0, col) < spec.key_padding ? 1.0 : 0.0;
    });
  }
}

void AttentionProblem::make_modifiers() {
  const auto seed = static_cast<std::uint64_t>(spec.seed);
  if (spec.alibi) {
    Broadcast broadcast;
    broadcast.batch = !spec.alibi_varies;
    alibi = StridedTensor(ScalarType::kFloat32, extent(shape.query_heads, 1, 1), Layout::kBhsd,
                          spec.guard, broadcast);
    alibi.fill([&](std::int64_t batch, std::int64_t head, std::int64_t, std::int64_t) {
      return 0.3 * uniform_at(seed + 78, batch, head, 0, 0);
    });
  }
  if (spec.sink) {
    const ScalarType type =
        spec.dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
    sink = StridedTensor(type, {{1, 1, 1, 1}, shape.query_heads, 1, 1}, Layout::kBhsd, spec.guard);
    fill_normal(sink, 2.0, 16 * seed + 6);
  }
}

void AttentionProblem::make_outputs() {
  const Layout layout = layout_is_writable(spec.layout) ? spec.layout : Layout::kBhsd;
  const ScalarType accumulation =
      spec.dtype == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
  const ScalarType gradient = spec.unrounded_grads ? accumulation : spec.dtype;
  const auto make = [&](ScalarType type, std::int64_t heads, std::int64_t rows, std::int64_t cols) {
    return StridedTensor(type, extent(heads, rows, cols), layout, spec.guard);
  };
  out = make(spec.dtype, shape.query_heads, shape.q_len, shape.value_dim);
  if (spec.wants_logsumexp) {
    logsumexp = StridedTensor(accumulation, extent(shape.query_heads, shape.q_len, 1));
  }
  if (spec.packed) {
    PackedTensors packed = make_packed(shape, spec.dtype, spec.guard);
    grad_query = packed.query;
    grad_key = packed.key;
    grad_value = packed.value;
  } else {
    grad_query = make(gradient, shape.query_heads, shape.q_len, shape.head_dim);
    grad_key = make(gradient, shape.kv_heads, shape.kv_len, shape.head_dim);
    grad_value = make(gradient, shape.kv_heads, shape.kv_len, shape.value_dim);
  }
  if (spec.sink) grad_sink = StridedTensor(accumulation, extent(shape.query_heads, 1, 1));
  if (spec.wants_grad_mask) {
    grad_mask = StridedTensor(accumulation, extent(shape.query_heads, shape.q_len, shape.kv_len),
                              Layout::kBhsd, spec.guard, spec.mask.broadcast);
  }
}

AttentionProblem AttentionProblem::with_new_outputs() const {
  AttentionProblem result = *this;
  result.make_outputs();
  return result;
}

AttentionProblem AttentionProblem::as_float64() const {
  AttentionProblem result;
  result.spec = spec;
  result.spec.dtype = ScalarType::kFloat64;
  result.spec.layout = Layout::kBhsd;
  result.spec.packed = false;
  result.spec.guard = GuardSide::kBack;
  result.spec.wants_logsumexp = true;
  result.make_shape();
  result.query = query.as(ScalarType::kFloat64);
  result.key = key.as(ScalarType::kFloat64);
  result.value = value.as(ScalarType::kFloat64);
  result.grad_out = grad_out.as(ScalarType::kFloat64);
  if (grad_logsumexp) result.grad_logsumexp = grad_logsumexp.as(ScalarType::kFloat64);
  result.mask = mask;
  result.key_padding = key_padding;
  result.alibi = alibi;
  if (sink) result.sink = sink.as(ScalarType::kFloat64);
  result.make_outputs();
  return result;
}

}  // namespace torch_ext::testing
