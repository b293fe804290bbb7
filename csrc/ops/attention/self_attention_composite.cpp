// torch_ext::self_attention: projection, packed attention, projection.
#include <ATen/SequenceNumber.h>
#include <ATen/ops/linear.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "attention_autograd.h"
#include "attention_cpu.h"
#include "attention_signature.h"
#include "packed_attention.h"
#include "plain_dispatch.h"
#include "symbolic_sizes.h"

namespace torch_ext {
namespace {

constexpr const char* kSelfAttention = "self_attention";

/// shape is `sizes`, dtype and device input's.
void check_parameter(const char* name, const at::Tensor& parameter, const at::Tensor& input,
                     std::initializer_list<c10::SymInt> sizes, const char* meaning) {
  check_tensor_kind(kSelfAttention, name, parameter);
  TORCH_CHECK(parameter.scalar_type() == input.scalar_type(), "torch_ext::", kSelfAttention, ": ",
              name, " takes the dtype of input, ", input.scalar_type(), ", got ",
              parameter.scalar_type());
  TORCH_CHECK(parameter.device() == input.device(), "torch_ext::", kSelfAttention, ": ", name,
              " takes the device of input, ", input.device(), ", got ", parameter.device());
  const c10::SymIntArrayRef own = parameter.sym_sizes();
  bool same = own.size() == sizes.size();
  for (std::size_t dim = 0; same && dim < sizes.size(); ++dim) {
    same = equal(own[dim], sizes.begin()[dim]);
  }
  TORCH_CHECK(same, "torch_ext::", kSelfAttention, ": ", name, " takes the shape ", meaning, ", ",
              c10::SymIntArrayRef(sizes), ", got ", own);
}

template <typename Int>
AttentionGeometry<Int> check_self_attention(const SelfAttentionParameters& parameters,
                                            const AttentionArguments& options) {
  const at::Tensor& input = *parameters.input;
  const std::int64_t num_heads = parameters.num_heads;
  check_tensor_kind(kSelfAttention, "input", input);
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "torch_ext::", kSelfAttention,
              ": input takes (batch, seq, embed) or (seq, embed), got ", input.sym_sizes());
  const c10::SymInt embed = input.sym_size(-1);
  TORCH_CHECK(num_heads > 0, "torch_ext::", kSelfAttention,
              ": num_heads takes a positive number, got ", num_heads);
  TORCH_CHECK(equal(embed % num_heads, c10::SymInt(0)), "torch_ext::", kSelfAttention,
              ": num_heads takes a divisor of embed, ", embed, ", got ", num_heads);
  check_parameter("in_proj_weight", *parameters.in_proj_weight, input, {embed * 3, embed},
                  "(3 * embed, embed)");
  check_parameter("out_proj_weight", *parameters.out_proj_weight, input, {embed, embed},
                  "(embed, embed)");
  if (parameters.in_proj_bias != nullptr) {
    check_parameter("in_proj_bias", *parameters.in_proj_bias, input, {embed * 3}, "(3 * embed)");
  }
  if (parameters.out_proj_bias != nullptr) {
    check_parameter("out_proj_bias", *parameters.out_proj_bias, input, {embed}, "(embed)");
  }
  const auto sizes = sizes_of<Int>(input);
  auto geometry = packed_geometry<Int>(sizes.slice(0, sizes.size() - 1), num_heads,
                                       sizes.back() / Int(num_heads));
  // Of query, key and value, these checks look at dtype and device.
  const PackedProjection like_qkv{.qkv = &input, .num_heads = num_heads};
  check_attention_options(kSelfAttention, over_qkv(like_qkv, options), geometry,
                          SeedArgument::kDrawnLater);
  return geometry;
}

/// packed_attention_forward() past the dispatcher, of checked arguments.
at::Tensor plain_packed_attention(const PackedProjection& packed, const AttentionArguments& options,
                                  const AttentionGeometry<std::int64_t>& geometry) {
  RECORD_FUNCTION("torch_ext::packed_attention_forward",
                  std::vector<c10::IValue>({*packed.qkv, packed.num_heads}),
                  static_cast<std::int64_t>(at::sequence_number::peek()));
  if (needs_gradient({packed.qkv, options.attn_mask, options.sink})) {
    return std::get<0>(record_packed_attention_forward(packed, options, geometry));
  }
  return CpuAttention::packed_out(packed, options, geometry, /*logsumexp=*/nullptr);
}

struct CompositeSelfAttention {
  static at::Tensor self_attention(const SelfAttentionParameters& parameters,
                                   AttentionArguments options) {
    const at::Tensor& input = *parameters.input;
    const bool plain =
        is_plain_cpu_call({&input, parameters.in_proj_weight, parameters.in_proj_bias,
                           parameters.out_proj_weight, parameters.out_proj_bias, options.attn_mask,
                           options.key_padding_mask, options.sink, options.alibi_slopes});
    std::optional<AttentionGeometry<std::int64_t>> geometry;
    if (plain) {
      geometry = check_self_attention<std::int64_t>(parameters, options);
    } else {
      check_self_attention<c10::SymInt>(parameters, options);
    }
    at::Tensor seed;
    if (options.dropout_p > 0.0) {
      seed = draw_dropout_seed(input);
      options.dropout_seed = &seed;
    }
    // (..., seq, 3 * embed)
    const at::Tensor qkv =
        at::linear(input, *parameters.in_proj_weight, optional(parameters.in_proj_bias));
    const PackedProjection packed{.qkv = &qkv, .num_heads = parameters.num_heads};
    const at::Tensor out =  // (..., seq, embed)
        plain ? plain_packed_attention(packed, options, *geometry)
              : std::get<0>(call_packed_attention_forward(packed, options));
    return at::linear(out, *parameters.out_proj_weight, optional(parameters.out_proj_bias));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention_kernel<CompositeSelfAttention>));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention_kernel<CompositeSelfAttention>));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention_kernel<CompositeSelfAttention>));
}

}  // namespace torch_ext
