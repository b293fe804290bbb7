#include "attention_checks.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "../tensor_storage.h"
#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

constexpr std::int64_t kMaxDims = kMaxBatchDims + 3;

bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_dims(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() >= 2 && tensor.dim() <= kMaxDims, "torch_ext::", op, ": ", name,
              " takes 2 to ", kMaxDims,
              " dimensions, ([batch...,] [heads,] length, head_dim), got ", tensor.dim(), " (",
              tensor.sym_sizes(), ")");
}

void check_like_query(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& query) {
  TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "torch_ext::", op, ": ", name,
              " takes the dtype of query, ", query.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == query.device(), "torch_ext::", op, ": ", name,
              " takes the device of query, ", query.device(), ", got ", tensor.device());
}

/// Size of the dimension `from_right` places from the last; 1 where there is none.
template <typename Int>
Int size_or_one(const at::Tensor& tensor, std::int64_t from_right) {
  const std::int64_t dim = tensor.dim() - 1 - from_right;
  return dim < 0 ? Int(1) : sizes_of<Int>(tensor)[dim];
}

template <typename Int>
Int broadcast_batch_size(const char* op, const AttentionArguments& arguments,
                         std::int64_t from_right) {
  Int size = size_or_one<Int>(*arguments.query, from_right);
  for (const at::Tensor* tensor : {arguments.key, arguments.value}) {
    const Int other = size_or_one<Int>(*tensor, from_right);
    if (is_one(other)) continue;
    if (is_one(size)) {
      size = other;
      continue;
    }
    TORCH_CHECK(equal(size, other), "torch_ext::", op,
                ": query, key and value take batch dimensions that broadcast, got query ",
                arguments.query->sym_sizes(), ", key ", arguments.key->sym_sizes(), " and value ",
                arguments.value->sym_sizes());
  }
  return size;
}

template <typename Int>
void broadcast_heads(const char* op, const AttentionArguments& arguments,
                     AttentionGeometry<Int>& geometry) {
  const Int query_heads = size_or_one<Int>(*arguments.query, 2);
  const Int key_heads = size_or_one<Int>(*arguments.key, 2);
  const Int value_heads = size_or_one<Int>(*arguments.value, 2);
  TORCH_CHECK(!arguments.enable_gqa || (arguments.query->dim() >= 3 && arguments.key->dim() >= 3 &&
                                        arguments.value->dim() >= 3),
              "torch_ext::", op,
              ": enable_gqa takes query, key and value with a dimension of heads, (..., heads, "
              "length, head_dim), got query ",
              arguments.query->sym_sizes(), ", key ", arguments.key->sym_sizes(), " and value ",
              arguments.value->sym_sizes());
  geometry.kv_heads = is_one(key_heads) ? value_heads : key_heads;
  TORCH_CHECK(is_one(value_heads) || equal(geometry.kv_heads, value_heads), "torch_ext::", op,
              ": value takes as many heads as key, ", key_heads, ", or one, got ", value_heads);
  geometry.query_heads = query_heads;
  if (is_one(geometry.kv_heads)) return;
  if (arguments.enable_gqa) {
    TORCH_CHECK(divides(geometry.kv_heads, query_heads), "torch_ext::", op,
                ": key and value take a number of heads that divides query's, ", query_heads,
                ", got ", geometry.kv_heads);
  } else if (is_one(query_heads)) {
    geometry.query_heads = geometry.kv_heads;
  } else {
    TORCH_CHECK(equal(query_heads, geometry.kv_heads), "torch_ext::", op,
                ": key and value take as many heads as query, ", query_heads, ", or one, got ",
                geometry.kv_heads, " (fewer heads that divide query's take enable_gqa=True)");
  }
}

/// Whether the last dimensions of `tensor` broadcast to `target` and all in front of them are 1.
template <typename Int, typename Sizes>
bool broadcasts_to(const at::Tensor& tensor, const Sizes& target) {
  const auto sizes = sizes_of<Int>(tensor);
  const auto rank = static_cast<std::int64_t>(target.size());
  for (std::int64_t from_right = 0; from_right < tensor.dim(); ++from_right) {
    const Int& size = sizes[tensor.dim() - 1 - from_right];
    if (is_one(size)) continue;
    if (from_right >= rank || !equal(size, target[rank - 1 - from_right])) return false;
  }
  return true;
}

template <typename Int>
void check_mask(const char* op, const AttentionArguments& arguments,
                const AttentionGeometry<Int>& geometry) {
  const at::Tensor& mask = *arguments.attn_mask;
  const at::Tensor& query = *arguments.query;
  TORCH_CHECK(!mask.is_nested() && mask.layout() == at::kStrided, "torch_ext::", op,
              ": attn_mask takes a dense tensor; nested and sparse ones are not supported");
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.scalar_type() == at::kFloat ||
                  mask.scalar_type() == query.scalar_type(),
              "torch_ext::", op, ": attn_mask takes Bool, Float or the dtype of query, ",
              query.scalar_type(), ", got ", mask.scalar_type());
  TORCH_CHECK(mask.device() == query.device(), "torch_ext::", op,
              ": attn_mask takes the device of query, ", query.device(), ", got ", mask.device());
  check_readable(op, "attn_mask", mask);
  TORCH_CHECK(!arguments.is_causal, "torch_ext::", op,
              ": attn_mask takes None when is_causal=True, got a mask of shape ", mask.sym_sizes());
  const auto scores = geometry.score_sizes();
  TORCH_CHECK((broadcasts_to<Int>(mask, scores)), "torch_ext::", op,
              ": attn_mask takes a shape that broadcasts to (batch..., heads, q_len, kv_len), ",
              c10::ArrayRef<Int>(scores), ", got ", mask.sym_sizes());
}

template <typename Int>
void check_key_padding_mask(const char* op, const AttentionArguments& arguments,
                            const AttentionGeometry<Int>& geometry) {
  const at::Tensor& mask = *arguments.key_padding_mask;
  TORCH_CHECK(!mask.is_nested() && mask.layout() == at::kStrided, "torch_ext::", op,
              ": key_padding_mask takes a dense tensor; nested and sparse ones are not supported");
  TORCH_CHECK(mask.scalar_type() == at::kBool, "torch_ext::", op,
              ": key_padding_mask takes Bool, True = ignore, got ", mask.scalar_type());
  TORCH_CHECK(mask.device() == arguments.query->device(), "torch_ext::", op,
              ": key_padding_mask takes the device of query, ", arguments.query->device(), ", got ",
              mask.device());
  check_readable(op, "key_padding_mask", mask);
  auto target = geometry.batch();
  target.push_back(geometry.kv_len);
  TORCH_CHECK((mask.dim() >= 1 && broadcasts_to<Int>(mask, target)), "torch_ext::", op,
              ": key_padding_mask takes a shape that broadcasts to (batch..., kv_len), ",
              c10::ArrayRef<Int>(target), ", got ", mask.sym_sizes());
}

/// Checks that `tensor` is strided, readable, and on query's device.
void check_option_tensor(const char* op, const char* name, const at::Tensor& tensor,
                         const at::Tensor& query) {
  TORCH_CHECK(!tensor.is_nested() && tensor.layout() == at::kStrided, "torch_ext::", op, ": ", name,
              " takes a dense tensor; nested and sparse ones are not supported");
  TORCH_CHECK(tensor.device() == query.device(), "torch_ext::", op, ": ", name,
              " takes the device of query, ", query.device(), ", got ", tensor.device());
  check_readable(op, name, tensor);
}

template <typename Int>
void check_alibi_slopes(const char* op, const AttentionArguments& arguments,
                        const AttentionGeometry<Int>& geometry) {
  const at::Tensor& slopes = *arguments.alibi_slopes;
  check_option_tensor(op, "alibi_slopes", slopes, *arguments.query);
  TORCH_CHECK(slopes.scalar_type() == at::kFloat, "torch_ext::", op,
              ": alibi_slopes takes Float, got ", slopes.scalar_type());
  TORCH_CHECK(!slopes.requires_grad() || !at::GradMode::is_enabled(), "torch_ext::", op,
              ": alibi_slopes takes a tensor that does not require grad; slopes have no gradient "
              "here");
  auto target = geometry.batch();
  target.push_back(geometry.query_heads);
  TORCH_CHECK((slopes.dim() >= 1 && broadcasts_to<Int>(slopes, target)), "torch_ext::", op,
              ": alibi_slopes takes (heads) or (batch..., heads), ", c10::ArrayRef<Int>(target),
              ", got ", slopes.sym_sizes());
}

template <typename Int>
void check_sink(const char* op, const AttentionArguments& arguments,
                const AttentionGeometry<Int>& geometry) {
  const at::Tensor& sink = *arguments.sink;
  check_option_tensor(op, "sink", sink, *arguments.query);
  TORCH_CHECK(is_floating(sink.scalar_type()), "torch_ext::", op,
              ": sink takes Float, Double, BFloat16 or Half, got ", sink.scalar_type());
  TORCH_CHECK(sink.dim() == 1 && equal(sizes_of<Int>(sink)[0], geometry.query_heads),
              "torch_ext::", op, ": sink takes one number for each head of query, (",
              geometry.query_heads, "), got ", sink.sym_sizes());
}

/// What happens to scores beyond torch's own options.
template <typename Int>
void check_scores(const char* op, const AttentionArguments& arguments,
                  const AttentionGeometry<Int>& geometry) {
  for (const c10::SymInt* bound : {&arguments.window_left, &arguments.window_right}) {
    TORCH_CHECK(at_least(*bound, -1), "torch_ext::", op,
                ": window_size takes (left, right) of numbers of keys, or -1 for no bound, got (",
                arguments.window_left, ", ", arguments.window_right, ")");
  }
  // Written so that NaN fails.
  TORCH_CHECK(arguments.softcap >= 0.0 && std::isfinite(arguments.softcap), "torch_ext::", op,
              ": softcap takes 0 (none) or a positive, finite number, got ", arguments.softcap);
  if (arguments.alibi_slopes != nullptr) check_alibi_slopes(op, arguments, geometry);
  if (arguments.sink != nullptr) check_sink(op, arguments, geometry);
}

}  // namespace

void check_tensor_kind(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), "torch_ext::", op, ": ", name, " takes a tensor, got none");
  TORCH_CHECK(!tensor.is_nested(), "torch_ext::", op, ": ", name,
              " takes a dense tensor; nested tensors are not supported");
  TORCH_CHECK(!tensor.is_quantized(), "torch_ext::", op, ": ", name,
              " takes a floating tensor; quantized tensors are not supported");
  TORCH_CHECK(tensor.layout() == at::kStrided, "torch_ext::", op, ": ", name,
              " takes a dense tensor; sparse tensors are not supported, got layout ",
              tensor.layout());
  TORCH_CHECK(!tensor.is_complex(), "torch_ext::", op, ": ", name,
              " takes a real tensor; complex tensors are not supported, got ",
              tensor.scalar_type());
  TORCH_CHECK(is_floating(tensor.scalar_type()), "torch_ext::", op, ": ", name,
              " takes Float, Double, BFloat16 or Half, got ", tensor.scalar_type());
  check_readable(op, name, tensor);
}

void check_attention_kinds(const char* op, const AttentionArguments& arguments) {
  check_tensor_kind(op, "query", *arguments.query);
  check_tensor_kind(op, "key", *arguments.key);
  check_tensor_kind(op, "value", *arguments.value);
}

void check_dropout_p(const char* op, double dropout_p) {
  // Written so that NaN fails.
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, "torch_ext::", op,
              ": dropout_p takes a probability in [0, 1], got ", dropout_p);
}

void check_dropout_seed(const char* op, const at::Tensor* seed, c10::Device device) {
  TORCH_CHECK(seed != nullptr, "torch_ext::", op,
              ": dropout_seed takes an int64 tensor of one element when dropout_p > 0, got None");
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->layout() == at::kStrided &&
                  equal(seed->sym_numel(), c10::SymInt(1)),
              "torch_ext::", op, ": dropout_seed takes an int64 tensor of one element, got ",
              seed->scalar_type(), " of shape ", seed->sym_sizes());
  TORCH_CHECK(seed->device() == device, "torch_ext::", op,
              ": dropout_seed takes the device of query, ", device, ", got ", seed->device());
  check_readable(op, "dropout_seed", *seed);
}

void check_score_sizes(const char* op, std::size_t dims) {
  TORCH_CHECK(dims >= 2 && dims <= static_cast<std::size_t>(kMaxDims), "torch_ext::", op,
              ": sizes takes 2 to ", kMaxDims, " sizes, ([batch...,] [heads,] q_len, kv_len), got ",
              dims);
}

void check_no_tangents(const char* op, c10::ArrayRef<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor == nullptr || !tensor->defined() || !tensor->_fw_grad(/*level=*/0).defined(),
        "torch_ext::", op,
        ": forward-mode automatic differentiation is not supported; use reverse mode (backward(), "
        "torch.autograd.grad, torch.func.grad, vjp or jacrev)");
  }
}

template <typename Int>
AttentionGeometry<Int> check_attention(const char* op, const AttentionArguments& arguments,
                                       SeedArgument seed) {
  const at::Tensor& query = *arguments.query;
  const at::Tensor& key = *arguments.key;
  const at::Tensor& value = *arguments.value;
  check_attention_kinds(op, arguments);
  check_like_query(op, "key", key, query);
  check_like_query(op, "value", value, query);
  check_dims(op, "query", query);
  check_dims(op, "key", key);
  check_dims(op, "value", value);

  AttentionGeometry<Int> geometry;
  geometry.rank = std::max({query.dim(), key.dim(), value.dim()});
  geometry.q_len = size_or_one<Int>(query, 1);
  geometry.kv_len = size_or_one<Int>(key, 1);
  geometry.head_dim = size_or_one<Int>(query, 0);
  geometry.value_dim = size_or_one<Int>(value, 0);
  TORCH_CHECK(equal(size_or_one<Int>(key, 0), geometry.head_dim), "torch_ext::", op,
              ": key takes the head_dim of query, ", geometry.head_dim, ", got ",
              size_or_one<Int>(key, 0));
  TORCH_CHECK(equal(size_or_one<Int>(value, 1), geometry.kv_len), "torch_ext::", op,
              ": value takes the length of key, ", geometry.kv_len, ", got ",
              size_or_one<Int>(value, 1));
  for (std::int64_t dim = 0; dim < geometry.batch_dims(); ++dim) {
    geometry.batch_sizes[kMaxBatchDims - 1 - dim] =
        broadcast_batch_size<Int>(op, arguments, 3 + dim);
  }
  broadcast_heads(op, arguments, geometry);
  check_attention_options(op, arguments, geometry, seed);
  return geometry;
}

template <typename Int>
void check_attention_options(const char* op, const AttentionArguments& arguments,
                             const AttentionGeometry<Int>& geometry, SeedArgument seed) {
  check_dropout_p(op, arguments.dropout_p);
  TORCH_CHECK(!arguments.scale.has_value() || !std::isnan(*arguments.scale), "torch_ext::", op,
              ": scale takes a number, got NaN");
  check_scores(op, arguments, geometry);
  if (arguments.attn_mask != nullptr) check_mask(op, arguments, geometry);
  if (arguments.key_padding_mask != nullptr) check_key_padding_mask(op, arguments, geometry);
  if (seed == SeedArgument::kRequired && arguments.dropout_p > 0.0) {
    check_dropout_seed(op, arguments.dropout_seed, arguments.query->device());
  }
}

namespace {

template <typename Int, typename Sizes>
void check_gradient_tensor(const char* op, const char* name, const at::Tensor& tensor,
                           std::optional<at::ScalarType> dtype, const at::Tensor& query,
                           const char* meaning, const Sizes& sizes) {
  TORCH_CHECK(tensor.defined() && !tensor.is_nested() && tensor.layout() == at::kStrided,
              "torch_ext::", op, ": ", name,
              " takes a dense tensor; nested and sparse ones are not supported");
  if (dtype.has_value()) {
    TORCH_CHECK(tensor.scalar_type() == *dtype, "torch_ext::", op, ": ", name, " takes ", *dtype,
                ", got ", tensor.scalar_type());
  } else {
    TORCH_CHECK(is_floating(tensor.scalar_type()), "torch_ext::", op, ": ", name,
                " takes Float, Double, BFloat16 or Half, got ", tensor.scalar_type());
  }
  TORCH_CHECK(tensor.device() == query.device(), "torch_ext::", op, ": ", name,
              " takes the device of query, ", query.device(), ", got ", tensor.device());
  const auto own = sizes_of<Int>(tensor);
  bool same = own.size() == sizes.size();
  for (std::size_t dim = 0; same && dim < sizes.size(); ++dim) same = equal(own[dim], sizes[dim]);
  TORCH_CHECK(same, "torch_ext::", op, ": ", name, " takes the shape ", meaning, ", ",
              c10::ArrayRef<Int>(sizes), ", got ", tensor.sym_sizes());
  check_readable(op, name, tensor);
}

}  // namespace

template <typename Int>
void check_attention_gradients(const char* op, const AttentionArguments& arguments,
                               const AttentionGradients& gradients,
                               const AttentionGeometry<Int>& geometry) {
  const at::Tensor& query = *arguments.query;
  const at::ScalarType dtype = query.scalar_type();
  const auto out_sizes = geometry.out_sizes();
  const auto logsumexp_sizes = geometry.logsumexp_sizes();
  constexpr const char* kOut = "(batch..., heads, q_len, value_dim)";
  constexpr const char* kLogsumexp = "(batch..., heads, q_len)";
  // Compilers send gradients in the type that they computed them in.
  constexpr std::optional<at::ScalarType> kAnyType = std::nullopt;
  check_gradient_tensor<Int>(op, "grad_out", *gradients.grad_out, kAnyType, query, kOut, out_sizes);
  check_gradient_tensor<Int>(op, "out", *gradients.out, dtype, query, kOut, out_sizes);
  check_gradient_tensor<Int>(op, "logsumexp", *gradients.logsumexp, accumulate_type(dtype), query,
                             kLogsumexp, logsumexp_sizes);
  if (gradients.grad_logsumexp != nullptr) {
    check_gradient_tensor<Int>(op, "grad_logsumexp", *gradients.grad_logsumexp, kAnyType, query,
                               kLogsumexp, logsumexp_sizes);
  }
  TORCH_CHECK(!gradients.output_mask[kMask] ||
                  (arguments.attn_mask != nullptr && arguments.attn_mask->is_floating_point()),
              "torch_ext::", op,
              ": output_mask takes True for attn_mask only where it is an additive mask");
  TORCH_CHECK(!gradients.output_mask[kSink] || arguments.sink != nullptr, "torch_ext::", op,
              ": output_mask takes True for sink only where there is one");
}

template AttentionGeometry<std::int64_t> check_attention(const char*, const AttentionArguments&,
                                                         SeedArgument);
template AttentionGeometry<c10::SymInt> check_attention(const char*, const AttentionArguments&,
                                                        SeedArgument);
template void check_attention_options(const char*, const AttentionArguments&,
                                      const AttentionGeometry<std::int64_t>&, SeedArgument);
template void check_attention_options(const char*, const AttentionArguments&,
                                      const AttentionGeometry<c10::SymInt>&, SeedArgument);
template void check_attention_gradients(const char*, const AttentionArguments&,
                                        const AttentionGradients&,
                                        const AttentionGeometry<std::int64_t>&);
template void check_attention_gradients(const char*, const AttentionArguments&,
                                        const AttentionGradients&,
                                        const AttentionGeometry<c10::SymInt>&);

}  // namespace torch_ext
