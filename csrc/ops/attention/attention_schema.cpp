// Schemas of the attention operators.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string>

namespace torch_ext {

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag};
  // These draw a seed from torch's generator where dropout_p > 0. What they are made of takes the
  // seed as an argument, so that a recomputed forward pass drops the same weights.
  const std::vector<at::Tag> seeded{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};

  // Behind the arguments of torch's operator. window_size: (left, right), -1 does not bound;
  // softcap: 0 is none; alibi_slopes: broadcastable to (batch..., heads); sink: (heads).
  const std::string scores =
      ", SymInt[2] window_size=[-1, -1], float softcap=0.0, Tensor? alibi_slopes=None, "
      "Tensor? sink=None, bool causal_lower_right=False) -> ";

  m.def(("scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, "
         "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, float? scale=None, "
         "bool enable_gqa=False" +
         scores + "Tensor")
            .c_str(),
        seeded);
  m.def(("self_attention(Tensor input, Tensor in_proj_weight, Tensor? in_proj_bias, "
         "Tensor out_proj_weight, Tensor? out_proj_bias, int num_heads, Tensor? attn_mask=None, "
         "float dropout_p=0.0, bool is_causal=False, *, Tensor? key_padding_mask=None" +
         scores + "Tensor")
            .c_str(),
        seeded);

  // attention_forward() below, which draws its seed where dropout_p > 0 and none is given.
  m.def(("attention_with_logsumexp(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
         "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
         "SymInt causal_offset=0, Tensor? key_padding_mask=None, Tensor? dropout_seed=None" +
         scores + "(Tensor out, Tensor logsumexp)")
            .c_str(),
        seeded);

  // contiguous: out and the gradients have the memory order that torch gives them without its flash
  // kernel, also where that kernel would do.
  m.def(("attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
         "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
         "SymInt causal_offset=0, Tensor? key_padding_mask=None, Tensor? dropout_seed=None, "
         "bool contiguous=False" +
         scores + "(Tensor out, Tensor logsumexp)")
            .c_str(),
        pure);
  // output_mask: of query, key, value, attn_mask and sink, which gradients are wanted; the others
  // come back undefined (None). Differentiable with respect to grad_out, grad_logsumexp, query,
  // key, value, attn_mask and sink; out and logsumexp count as functions of those, not as inputs.
  m.def(
      ("attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, "
       "Tensor value, Tensor out, Tensor logsumexp, Tensor? attn_mask=None, float dropout_p=0.0, "
       "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, SymInt causal_offset=0, "
       "Tensor? key_padding_mask=None, Tensor? dropout_seed=None, "
       "bool[5] output_mask=[True, True, True, False, False], bool contiguous=False" +
       scores +
       "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor "
       "grad_sink)")
          .c_str(),
      pure);
  // The weights that a forward pass with this seed keeps, True = keep, as a tensor. sizes:
  // (batch..., heads, q_len, kv_len).
  m.def("attention_dropout_mask(Tensor dropout_seed, float dropout_p, SymInt[] sizes) -> Tensor",
        pure);

  // The middle of self_attention: qkv is (batch, seq, 3 * embed), out (batch, seq, embed).
  m.def(("packed_attention_forward(Tensor qkv, int num_heads, Tensor? attn_mask=None, "
         "float dropout_p=0.0, bool is_causal=False, *, Tensor? key_padding_mask=None, "
         "Tensor? dropout_seed=None" +
         scores + "(Tensor out, Tensor logsumexp)")
            .c_str(),
        pure);
  m.def(
      ("packed_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor qkv, "
       "int num_heads, Tensor out, Tensor logsumexp, Tensor? attn_mask=None, float dropout_p=0.0, "
       "bool is_causal=False, *, Tensor? key_padding_mask=None, Tensor? dropout_seed=None, "
       "bool[3] output_mask=[True, False, False]" +
       scores + "(Tensor grad_qkv, Tensor grad_mask, Tensor grad_sink)")
          .c_str(),
      pure);
}

}  // namespace torch_ext
