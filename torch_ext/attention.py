"""Fused attention as Python functions: each is a call of the operator of the same name."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext import _C, causal_bias

__all__ = [
    "attention_forward",
    "last_attention_path",
    "scaled_dot_product_attention",
    "self_attention",
]

_scaled_dot_product_attention = torch.ops.torch_ext.scaled_dot_product_attention.default
_attention_with_logsumexp = torch.ops.torch_ext.attention_with_logsumexp.default
_self_attention = torch.ops.torch_ext.self_attention.default


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale * query @ key^T + mask) @ value``, fused.

    Means what ``torch.nn.functional.scaled_dot_product_attention`` means, and takes what it takes.
    Strides are free: transposed heads, slices of packed projections and expanded batches are read
    where they lie. Results are bitwise the same for every thread count.

    Args:
        query: (batch..., heads, q_len, head_dim), 2 to 7 dimensions, float32, float64, bfloat16 or
            float16. Tensors of 2 dimensions have neither batch nor heads, those of 3 no batch.
        key: (batch..., kv_heads, kv_len, head_dim); leading dimensions broadcast with query's.
        value: (batch..., kv_heads, kv_len, value_dim).
        attn_mask: any shape that broadcasts to (batch..., heads, q_len, kv_len). bool: True =
            attend. float32 or query's dtype: added to the scaled scores, and differentiable. Or a
            ``torch.nn.attention.bias`` causal mask.
        dropout_p: probability in [0, 1] of dropping a weight, drawn from torch's generator.
        is_causal: query i attends to keys j <= i. Not together with attn_mask.
        scale: 1 / sqrt(head_dim) by default; 0 and negative numbers are fine.
        enable_gqa: kv_heads may be any divisor of heads.

    Returns:
        (batch..., heads, q_len, value_dim), differentiable twice. A query that attends to nothing
        gives 0, and 0 gradients.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    if attn_mask is not None and causal_bias.is_causal_bias(attn_mask):
        return causal_bias.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    return _scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_offset: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the logsumexp of each query's scores, to merge partial results by.

    Args:
        query, key, value, attn_mask, dropout_p, scale, enable_gqa: as in
            scaled_dot_product_attention.
        is_causal: query i attends to keys j <= i + causal_offset. Not together with attn_mask.
        causal_offset: 0 aligns the triangle top left, ``kv_len - q_len`` lower right.
        key_padding_mask: bool, broadcastable to (batch..., kv_len), True = ignore that key. Goes
            with is_causal and with attn_mask.
        dropout_seed: int64, one element, on query's device: the same seed drops the same weights.
            Drawn from torch's generator where dropout_p > 0 and none is given.

    Returns:
        (out, logsumexp): out as in scaled_dot_product_attention, logsumexp (batch..., heads, q_len)
        in float32, or float64 for float64 inputs, -inf where a query attends to nothing. Both are
        differentiable.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    return _attention_with_logsumexp(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        causal_offset=causal_offset,
        key_padding_mask=key_padding_mask,
        dropout_seed=dropout_seed,
    )


def self_attention(
    input: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """A whole multi-head self-attention layer: projection, attention, projection.

    What ``nn.MultiheadAttention(embed, num_heads, batch_first=True)`` gives for one input and
    ``need_weights=False``, with its parameters. Between the projections nothing is transposed,
    copied or concatenated, forward and backward.

    Args:
        input: (batch, seq, embed) or (seq, embed), float32, float64, bfloat16 or float16.
        in_proj_weight: (3 * embed, embed), query, key and value one below the other.
        in_proj_bias: (3 * embed) or None.
        out_proj_weight: (embed, embed).
        out_proj_bias: (embed) or None.
        num_heads: a divisor of embed.
        attn_mask: broadcastable to (batch, num_heads, seq, seq), as in
            scaled_dot_product_attention: bool, True = attend (``nn.MultiheadAttention`` has it the
            other way round), or additive and differentiable.
        dropout_p: probability in [0, 1] of dropping a weight, drawn from torch's generator.
        is_causal: position i attends to positions j <= i. Not together with attn_mask.
        key_padding_mask: bool, (batch, seq), or (seq) without a batch, True = ignore. Goes with
            is_causal and with attn_mask.

    Returns:
        A tensor of input's shape.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    return _self_attention(
        input,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        num_heads,
        attn_mask,
        dropout_p,
        is_causal,
        key_padding_mask=key_padding_mask,
    )


def last_attention_path() -> str:
    """Where the newest attention call of the process went, forward or backward, on any thread.

    Returns:
        A kernel such as ``"cpu.avx2.tile"`` or ``"cpu.avx2.decode"``; ``"cpu.empty"`` where there
        was nothing to compute; ``"torch: <reason>"`` where the drop-in left a call to torch's own
        kernel; ``"none"`` before the first call.
    """
    return _C.last_attention_path()
