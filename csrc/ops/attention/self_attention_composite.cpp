// torch_ext::self_attention: projection, packed attention, projection.
#include <ATen/ops/linear.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "attention_cpu.h"
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

struct Parameters {
  const at::Tensor& in_proj_weight;
  const at::Tensor* in_proj_bias;
  const at::Tensor& out_proj_weight;
  const at::Tensor* out_proj_bias;
};

void check_self_attention(const at::Tensor& input, const Parameters& parameters,
                          std::int64_t num_heads, const AttentionArguments& arguments) {
  check_tensor_kind(kSelfAttention, "input", input);
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "torch_ext::", kSelfAttention,
              ": input takes (batch, seq, embed) or (seq, embed), got ", input.sym_sizes());
  const c10::SymInt embed = input.sym_size(-1);
  TORCH_CHECK(num_heads > 0, "torch_ext::", kSelfAttention,
              ": num_heads takes a positive number, got ", num_heads);
  TORCH_CHECK(equal(embed % num_heads, c10::SymInt(0)), "torch_ext::", kSelfAttention,
              ": num_heads takes a divisor of embed, ", embed, ", got ", num_heads);
  check_parameter("in_proj_weight", parameters.in_proj_weight, input, {embed * 3, embed},
                  "(3 * embed, embed)");
  check_parameter("out_proj_weight", parameters.out_proj_weight, input, {embed, embed},
                  "(embed, embed)");
  if (parameters.in_proj_bias != nullptr) {
    check_parameter("in_proj_bias", *parameters.in_proj_bias, input, {embed * 3}, "(3 * embed)");
  }
  if (parameters.out_proj_bias != nullptr) {
    check_parameter("out_proj_bias", *parameters.out_proj_bias, input, {embed}, "(embed)");
  }
  const c10::SymIntArrayRef sizes = input.sym_sizes();
  check_attention_options(
      kSelfAttention, arguments,
      packed_geometry<c10::SymInt>(sizes.slice(0, sizes.size() - 1), num_heads, embed / num_heads),
      SeedArgument::kDrawnLater);
}

at::Tensor self_attention(const at::Tensor& input, const at::Tensor& in_proj_weight,
                          const OptionalTensor& in_proj_bias, const at::Tensor& out_proj_weight,
                          const OptionalTensor& out_proj_bias, std::int64_t num_heads,
                          const OptionalTensor& attn_mask, double dropout_p, bool is_causal,
                          const OptionalTensor& key_padding_mask) {
  const Parameters parameters{in_proj_weight, given(in_proj_bias), out_proj_weight,
                              given(out_proj_bias)};
  check_self_attention(input, parameters, num_heads,
                       {.query = input,
                        .key = input,
                        .value = input,
                        .attn_mask = given(attn_mask),
                        .dropout_p = dropout_p,
                        .is_causal = is_causal,
                        .key_padding_mask = given(key_padding_mask)});
  const bool plain =
      is_plain_cpu_inference({&input, &in_proj_weight, parameters.in_proj_bias, &out_proj_weight,
                              parameters.out_proj_bias, given(attn_mask), given(key_padding_mask)});
  OptionalTensor seed;
  if (dropout_p > 0.0) seed = draw_dropout_seed(input);
  const at::Tensor qkv = at::linear(input, in_proj_weight, in_proj_bias);  // (..., seq, 3 * embed)
  at::Tensor out;                                                          // (..., seq, embed)
  if (plain) {
    RECORD_FUNCTION("torch_ext::packed_attention_forward", c10::ArrayRef<const c10::IValue>{});
    out =
        run_packed_attention_forward_cpu(kSelfAttention, qkv, num_heads, given(attn_mask),
                                         dropout_p, is_causal, given(key_padding_mask), given(seed),
                                         /*logsumexp=*/nullptr);
  } else {
    out = std::get<0>(call_packed_attention_forward(qkv, num_heads, attn_mask, dropout_p, is_causal,
                                                    key_padding_mask, seed));
  }
  return at::linear(out, out_proj_weight, out_proj_bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutograd, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention));
}

// Nested tensors have a composite key of their own; the checks name them as unsupported.
TORCH_LIBRARY_IMPL(torch_ext, CompositeImplicitAutogradNestedTensor, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention));
}

// vmap takes the composite apart, instead of calling it once for each sample.
TORCH_LIBRARY_IMPL(torch_ext, FuncTorchBatched, m) {
  m.impl(kSelfAttention, TORCH_FN(self_attention));
}

}  // namespace torch_ext
