"""Fused attention as Python functions: each is a call of the operator of the same name."""

from __future__ import annotations

from typing import Any

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


def _scores(
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    causal_lower_right: bool,
) -> dict[str, Any]:
    """Those of the options that are given: an operator takes half a microsecond to read each."""
    options: dict[str, Any] = {}
    if window_size != (-1, -1):
        options["window_size"] = window_size
    if softcap != 0.0:
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if sink is not None:
        options["sink"] = sink
    if causal_lower_right is not False:
        options["causal_lower_right"] = causal_lower_right
    return options


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    causal_lower_right: bool = False,
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
        window_size: (left, right): query i attends to keys i - left <= j <= i + right; -1 = no
            bound. Goes with is_causal, which bounds the right side by 0, and with masks. No mask is
            built: work grows with the window.
        softcap: where > 0, scaled scores become ``softcap * tanh(scores / softcap)``, before masks
            are added.
        alibi_slopes: float32, (heads) or (batch..., heads): ``-slope * |i - j|`` is added to the
            scores. Without a gradient.
        sink: (heads), any floating dtype: one more score of each row, which takes its part of the
            softmax and has no value. Differentiable.
        causal_lower_right: the diagonal that is_causal, window_size and alibi_slopes count from
            ends in the lower right corner: i stands for i + kv_len - q_len.

    Returns:
        (batch..., heads, q_len, value_dim), differentiable twice. A query that attends to nothing
        gives 0, and 0 gradients.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    options = _scores(window_size, softcap, alibi_slopes, sink, causal_lower_right)
    if attn_mask is not None and causal_bias.is_causal_bias(attn_mask):
        return causal_bias.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options
        )
    if scale is not None:
        options["scale"] = scale
    if enable_gqa is not False:
        options["enable_gqa"] = enable_gqa
    return _scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, **options
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    causal_lower_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention with the logsumexp of each query's scores, to merge partial results by.

    Args:
        query, key, value, attn_mask, dropout_p, scale, enable_gqa, window_size, softcap,
            alibi_slopes, sink, causal_lower_right: as in scaled_dot_product_attention.
        is_causal: query i attends to keys j <= i + causal_offset. Not together with attn_mask.
        causal_offset: moves the diagonal of is_causal, window_size and alibi_slopes to the right,
            from the upper left corner or, with causal_lower_right, from the lower right one.
        key_padding_mask: bool, broadcastable to (batch..., kv_len), True = ignore that key. Goes
            with is_causal and with attn_mask.
        dropout_seed: int64, one element, on query's device: the same seed drops the same weights.
            Drawn from torch's generator where dropout_p > 0 and none is given.

    Returns:
        (out, logsumexp): out as in scaled_dot_product_attention, logsumexp (batch..., heads, q_len)
        in float32, or float64 for float64 inputs, -inf where a query attends to nothing. It
        includes the sink. Both are differentiable.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    options = _scores(window_size, softcap, alibi_slopes, sink, causal_lower_right)
    if scale is not None:
        options["scale"] = scale
    if enable_gqa is not False:
        options["enable_gqa"] = enable_gqa
    if causal_offset != 0:
        options["causal_offset"] = causal_offset
    if key_padding_mask is not None:
        options["key_padding_mask"] = key_padding_mask
    if dropout_seed is not None:
        options["dropout_seed"] = dropout_seed
    return _attention_with_logsumexp(query, key, value, attn_mask, dropout_p, is_causal, **options)


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    causal_lower_right: bool = False,
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
        window_size, softcap, alibi_slopes, sink, causal_lower_right: as in
            scaled_dot_product_attention.

    Returns:
        A tensor of input's shape.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation.
    """
    options = _scores(window_size, softcap, alibi_slopes, sink, causal_lower_right)
    if key_padding_mask is not None:
        options["key_padding_mask"] = key_padding_mask
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
        **options,
    )


def last_attention_path() -> str:
    """Where the newest attention call of the process went, forward or backward, on any thread.

    Returns:
        A kernel such as ``"cpu.avx2.tile"`` or ``"cpu.avx2.decode"``; ``"cpu.empty"`` where there
        was nothing to compute; ``"torch: <reason>"`` where the drop-in left a call to torch's own
        kernel; ``"none"`` before the first call.
    """
    return _C.last_attention_path()
