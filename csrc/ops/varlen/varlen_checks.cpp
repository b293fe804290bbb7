#include "varlen_checks.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "../attention/symbolic_sizes.h"
#include "../tensor_storage.h"
#include "cache_checks.h"

namespace torch_ext {
namespace {

bool is_index(at::ScalarType type) { return type == at::kInt || type == at::kLong; }

void check_rows(const char* op, const char* name, const at::Tensor& tensor, const char* shape) {
  check_tensor_kind(op, name, tensor);
  TORCH_CHECK(tensor.dim() == 3, "torch_ext::", op, ": ", name, " takes 3 dimensions, ", shape,
              ", got ", tensor.dim(), " (", tensor.sym_sizes(), ")");
}

void check_like_query(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& query) {
  TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "torch_ext::", op, ": ", name,
              " takes the dtype of query, ", query.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == query.device(), "torch_ext::", op, ": ", name,
              " takes the device of query, ", query.device(), ", got ", tensor.device());
}

void check_index_tensor(const char* op, const char* name, const at::Tensor& tensor,
                        const char* shape, const at::Tensor& query) {
  TORCH_CHECK(tensor.defined(), "torch_ext::", op, ": ", name, " takes a tensor, got none");
  TORCH_CHECK(!tensor.is_nested() && tensor.layout() == at::kStrided &&
                  is_index(tensor.scalar_type()) && tensor.dim() == 1,
              "torch_ext::", op, ": ", name, " takes a dense Int or Long tensor of shape ", shape,
              ", got ", tensor.scalar_type(), " of shape ", tensor.sym_sizes());
  TORCH_CHECK(tensor.device() == query.device(), "torch_ext::", op, ": ", name,
              " takes the device of query, ", query.device(), ", got ", tensor.device());
  check_readable(op, name, tensor);
}

void check_cumulative(const char* op, const char* name, const at::Tensor& tensor,
                      const at::Tensor& query) {
  check_index_tensor(op, name, tensor, "(sequences + 1)", query);
  TORCH_CHECK(!is_zero(tensor.sym_size(0)), "torch_ext::", op, ": ", name,
              " takes one element more than there are sequences, at least 1, got none");
}

void check_alibi_slopes(const char* op, const VarlenArguments& arguments,
                        const VarlenSizes& sizes) {
  const at::Tensor& slopes = *given(arguments.alibi_slopes);
  TORCH_CHECK(slopes.scalar_type() == at::kFloat && slopes.layout() == at::kStrided,
              "torch_ext::", op, ": alibi_slopes takes a dense Float tensor, got ",
              slopes.scalar_type());
  TORCH_CHECK(slopes.device() == arguments.query.device(), "torch_ext::", op,
              ": alibi_slopes takes the device of query, ", arguments.query.device(), ", got ",
              slopes.device());
  const bool fits = (slopes.dim() == 1 && equal(slopes.sym_size(0), sizes.heads)) ||
                    (slopes.dim() == 2 && equal(slopes.sym_size(0), sizes.sequences) &&
                     equal(slopes.sym_size(1), sizes.heads));
  TORCH_CHECK(fits, "torch_ext::", op,
              ": alibi_slopes takes the shape (heads) or (sequences, heads), (", sizes.heads,
              ") or (", sizes.sequences, ", ", sizes.heads, "), got ", slopes.sym_sizes());
  check_readable(op, "alibi_slopes", slopes);
}

void check_sink(const char* op, const VarlenArguments& arguments, const VarlenSizes& sizes) {
  const at::Tensor& sink = *given(arguments.sink);
  check_tensor_kind(op, "sink", sink);
  TORCH_CHECK(sink.device() == arguments.query.device(), "torch_ext::", op,
              ": sink takes the device of query, ", arguments.query.device(), ", got ",
              sink.device());
  TORCH_CHECK(sink.dim() == 1 && equal(sink.sym_size(0), sizes.heads), "torch_ext::", op,
              ": sink takes the shape (heads), (", sizes.heads, "), got ", sink.sym_sizes());
}

void check_options(const char* op, const VarlenArguments& arguments, const VarlenSizes& sizes,
                   SeedArgument seed) {
  check_dropout_p(op, arguments.dropout_p);
  TORCH_CHECK(!arguments.scale.has_value() || !std::isnan(*arguments.scale), "torch_ext::", op,
              ": scale takes a number, got NaN");
  TORCH_CHECK(arguments.softcap >= 0.0 && std::isfinite(arguments.softcap), "torch_ext::", op,
              ": softcap takes a number from 0 (none) on, got ", arguments.softcap);
  for (const std::int64_t size : arguments.window_size) {
    TORCH_CHECK(size >= -1, "torch_ext::", op,
                ": window_size takes two numbers from -1 (unbounded) on, got (",
                arguments.window_size[0], ", ", arguments.window_size[1], ")");
  }
  if (const at::Tensor* used = given(arguments.seqused_k)) {
    check_index_tensor(op, "seqused_k", *used, "(sequences)", arguments.query);
    TORCH_CHECK(equal(used->sym_size(0), sizes.sequences), "torch_ext::", op,
                ": seqused_k takes an element for each sequence, ", sizes.sequences, ", got ",
                used->sym_size(0));
  }
  if (given(arguments.alibi_slopes) != nullptr) check_alibi_slopes(op, arguments, sizes);
  if (given(arguments.sink) != nullptr) check_sink(op, arguments, sizes);
  if (seed == SeedArgument::kRequired && arguments.dropout_p > 0.0) {
    check_dropout_seed(op, given(arguments.dropout_seed), arguments.query.device());
  }
}

void check_shape(const char* op, const char* name, const at::Tensor& tensor, const char* shape,
                 std::initializer_list<c10::SymInt> sizes) {
  TORCH_CHECK(tensor.defined() && !tensor.is_nested() && tensor.layout() == at::kStrided,
              "torch_ext::", op, ": ", name,
              " takes a dense tensor; nested and sparse ones are not supported");
  bool fits = tensor.dim() == static_cast<std::int64_t>(sizes.size());
  std::int64_t dim = 0;
  for (const c10::SymInt& size : sizes) fits = fits && equal(tensor.sym_size(dim++), size);
  TORCH_CHECK(fits, "torch_ext::", op, ": ", name, " takes the shape ", shape, ", ",
              c10::SymIntArrayRef(sizes.begin(), sizes.size()), ", got ", tensor.sym_sizes());
  check_readable(op, name, tensor);
}

}  // namespace

namespace {

/// Keys and values as rows of packed sequences.
void check_packed_keys(const char* op, const VarlenArguments& arguments, VarlenSizes& sizes) {
  const at::Tensor& query = arguments.query;
  const at::Tensor& key = arguments.key;
  const at::Tensor& value = arguments.value;
  check_rows(op, "key", key, "(total_k, kv_heads, head_dim)");
  check_rows(op, "value", value, "(total_k, kv_heads, value_dim)");
  check_like_query(op, "key", key, query);
  check_like_query(op, "value", value, query);
  sizes.total_k = key.sym_size(0);
  sizes.kv_heads = key.sym_size(1);
  sizes.value_dim = value.sym_size(2);
  TORCH_CHECK(given(arguments.cu_seq_k) != nullptr, "torch_ext::", op,
              ": cu_seq_k takes a tensor where there is no block_table, got None");
  TORCH_CHECK(equal(key.sym_size(2), sizes.head_dim), "torch_ext::", op,
              ": key takes the head_dim of query, ", sizes.head_dim, ", got ", key.sym_size(2));
  TORCH_CHECK(equal(value.sym_size(0), sizes.total_k) && equal(value.sym_size(1), sizes.kv_heads),
              "torch_ext::", op, ": value takes the rows and heads of key, (", sizes.total_k, ", ",
              sizes.kv_heads, "), got (", value.sym_size(0), ", ", value.sym_size(1), ")");
  for (const OptionalTensor* tensor :
       {&arguments.leftpad_k, &arguments.k_scale, &arguments.v_scale}) {
    TORCH_CHECK(given(*tensor) == nullptr, "torch_ext::", op,
                ": leftpad_k, k_scale and v_scale take None where there is no block_table");
  }
}

/// Keys and values in pages.
void check_pages(const char* op, const VarlenArguments& arguments, VarlenSizes& sizes) {
  const at::Tensor& key = arguments.key;
  check_caches(op, {"key", "value"}, key, arguments.value, arguments.query.scalar_type(),
               arguments.k_scale, arguments.v_scale);
  TORCH_CHECK(key.device() == arguments.query.device(), "torch_ext::", op,
              ": key takes the device of query, ", arguments.query.device(), ", got ",
              key.device());
  sizes.total_k = key.sym_size(0) * key.sym_size(1);
  sizes.kv_heads = key.sym_size(2);
  sizes.value_dim = arguments.value.sym_size(3);
  TORCH_CHECK(equal(key.sym_size(3), sizes.head_dim), "torch_ext::", op,
              ": key takes the head_dim of query, ", sizes.head_dim, ", got ", key.sym_size(3));
  const at::Tensor& table = *given(arguments.block_table);
  TORCH_CHECK(
      !table.is_nested() && table.layout() == at::kStrided && table.scalar_type() == at::kInt &&
          table.dim() == 2 && equal(table.sym_size(0), sizes.sequences),
      "torch_ext::", op,
      ": block_table takes a dense Int tensor of shape (sequences, "
      "pages), a row for each of ",
      sizes.sequences, " sequences, got ", table.scalar_type(), " of shape ", table.sym_sizes());
  TORCH_CHECK(table.device() == key.device(), "torch_ext::", op,
              ": block_table takes the device of query, ", key.device(), ", got ", table.device());
  check_readable(op, "block_table", table);
  TORCH_CHECK(given(arguments.seqused_k) != nullptr || given(arguments.cu_seq_k) != nullptr,
              "torch_ext::", op,
              ": seqused_k takes a tensor where there is a block_table and no cu_seq_k, got None");
  if (const at::Tensor* leftpad = given(arguments.leftpad_k)) {
    check_index_tensor(op, "leftpad_k", *leftpad, "(sequences)", arguments.query);
    TORCH_CHECK(equal(leftpad->sym_size(0), sizes.sequences), "torch_ext::", op,
                ": leftpad_k takes an element for each sequence, ", sizes.sequences, ", got ",
                leftpad->sym_size(0));
  }
}

}  // namespace

VarlenSizes check_varlen(const char* op, const VarlenArguments& arguments, SeedArgument seed) {
  const at::Tensor& query = arguments.query;
  check_rows(op, "query", query, "(total_q, heads, head_dim)");
  check_cumulative(op, "cu_seq_q", arguments.cu_seq_q, query);
  VarlenSizes sizes{.total_q = query.sym_size(0),
                    .total_k = 0,
                    .heads = query.sym_size(1),
                    .kv_heads = 0,
                    .head_dim = query.sym_size(2),
                    .value_dim = 0,
                    .sequences = arguments.cu_seq_q.sym_size(0) - 1};
  if (given(arguments.block_table) != nullptr) {
    check_pages(op, arguments, sizes);
  } else {
    check_packed_keys(op, arguments, sizes);
  }
  if (const at::Tensor* cu_seq_k = given(arguments.cu_seq_k)) {
    check_cumulative(op, "cu_seq_k", *cu_seq_k, query);
    TORCH_CHECK(equal(cu_seq_k->sym_size(0), sizes.sequences + 1), "torch_ext::", op,
                ": cu_seq_k takes as many elements as cu_seq_q, ", sizes.sequences + 1, ", got ",
                cu_seq_k->sym_size(0));
  }
  if (arguments.enable_gqa) {
    TORCH_CHECK(divides(sizes.kv_heads, sizes.heads), "torch_ext::", op,
                ": key and value take a number of heads that divides query's, ", sizes.heads,
                ", got ", sizes.kv_heads);
  } else {
    TORCH_CHECK(equal(sizes.kv_heads, sizes.heads), "torch_ext::", op,
                ": key and value take as many heads as query, ", sizes.heads, ", got ",
                sizes.kv_heads, " (fewer heads that divide query's take enable_gqa=True)");
  }
  check_options(op, arguments, sizes, seed);
  return sizes;
}

void check_varlen_gradients(const char* op, const VarlenArguments& arguments,
                            const VarlenGradients& gradients, const VarlenSizes& sizes) {
  const at::Tensor& query = arguments.query;
  constexpr const char* kOut = "(total_q, heads, value_dim)";
  constexpr const char* kLogsumexp = "(heads, total_q)";
  const std::initializer_list<c10::SymInt> out_sizes{sizes.total_q, sizes.heads, sizes.value_dim};
  const std::initializer_list<c10::SymInt> logsumexp_sizes{sizes.heads, sizes.total_q};
  check_shape(op, "grad_out", gradients.grad_out, kOut, out_sizes);
  check_shape(op, "out", gradients.out, kOut, out_sizes);
  check_shape(op, "logsumexp", gradients.logsumexp, kLogsumexp, logsumexp_sizes);
  check_like_query(op, "out", gradients.out, query);
  TORCH_CHECK(gradients.logsumexp.scalar_type() == accumulate_type(query.scalar_type()),
              "torch_ext::", op, ": logsumexp takes ", accumulate_type(query.scalar_type()),
              ", got ", gradients.logsumexp.scalar_type());
  for (const at::Tensor* tensor : {&gradients.grad_out, &gradients.logsumexp}) {
    TORCH_CHECK(tensor->device() == query.device(), "torch_ext::", op,
                ": grad_out and logsumexp take the device of query, ", query.device(), ", got ",
                tensor->device());
  }
  check_tensor_kind(op, "grad_out", gradients.grad_out);
  if (const at::Tensor* grad = given(gradients.grad_logsumexp)) {
    check_shape(op, "grad_logsumexp", *grad, kLogsumexp, logsumexp_sizes);
    check_tensor_kind(op, "grad_logsumexp", *grad);
    TORCH_CHECK(grad->device() == query.device(), "torch_ext::", op,
                ": grad_logsumexp takes the device of query, ", query.device(), ", got ",
                grad->device());
  }
  TORCH_CHECK(!gradients.output_mask[3] || given(arguments.sink) != nullptr, "torch_ext::", op,
              ": output_mask takes True for sink only where a sink is given");
}

}  // namespace torch_ext
