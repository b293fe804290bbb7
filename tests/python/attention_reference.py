"""Attention as a plain formula in float64, with every feature of the operators.

Nothing here is fast or clever: each line is one line of the definition, and autograd differentiates
it. It is checked against torch's own attention in test_attention_reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The kernels decide with 16 random bits per weight: probabilities have this resolution.
DROPOUT_STEPS = 1 << 16


def dropout_factor(dropout_p: float) -> float:
    """What a kept weight is multiplied by: the inverse of the realised keep probability."""
    dropped = math.floor(dropout_p * DROPOUT_STEPS + 0.5)
    return 0.0 if dropped >= DROPOUT_STEPS else DROPOUT_STEPS / (DROPOUT_STEPS - dropped)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_offset: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    rounding: torch.dtype | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    causal_lower_right: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp), float64, differentiable in everything floating.

    Args:
        query: (batch..., heads, q_len, head_dim), or without heads, or without batch
        key: (batch..., kv_heads, kv_len, head_dim)
        value: (batch..., kv_heads, kv_len, value_dim)
        attn_mask: broadcastable to (batch..., heads, q_len, kv_len), boolean (True = attend)
            or added
        key_padding_mask: broadcastable to (batch..., kv_len), True = ignore
        keep: the weights that dropout keeps, (batch..., heads, q_len, kv_len)
        rounding: round where a fused kernel of this dtype does, see _RoundedAttention
        window_size, softcap, alibi_slopes, sink, causal_lower_right: as in
            torch_ext.scaled_dot_product_attention
        dtype: the precision of every step
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    if scale is None:
        scale = 1.0 / math.sqrt(query.size(-1)) if query.size(-1) else 1.0

    scores = scale * (query @ key.transpose(-2, -1))
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    excluded = torch.zeros((), dtype=torch.bool)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        excluded = excluded | ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(dtype)
    offset = causal_offset + (key.size(-2) - query.size(-2) if causal_lower_right else 0)
    distance = torch.arange(key.size(-2)) - torch.arange(query.size(-2))[:, None] - offset
    if alibi_slopes is not None:
        bias = alibi_slopes[..., None, None].to(dtype) * distance.abs()
        scores = scores - (bias if query.dim() >= 3 else bias.squeeze(0))
    left, right = window_size
    if is_causal:
        right = 0
    if left >= 0:
        excluded = excluded | (distance < -left)
    if right >= 0:
        excluded = excluded | (distance > right)
    if key_padding_mask is not None:
        padding = key_padding_mask[..., None, :]
        excluded = excluded | (padding[..., None, :, :] if query.dim() >= 3 else padding)
    scores = scores.masked_fill(excluded, -math.inf)
    if sink is not None:
        column = sink.to(dtype)[:, None, None] if query.dim() >= 3 else sink.to(dtype)[:, None]
        scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], dim=-1)

    # A row that attends to nothing has weights 0, not 0 / 0, and no gradient.
    maximum = scores.detach().amax(-1, keepdim=True) if scores.size(-1) else scores.new_zeros(())
    maximum = maximum.masked_fill(maximum == -math.inf, 0.0)
    exponentials = (scores - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = exponentials / total
    if sink is not None:
        weights = weights[..., :-1]
    logsumexp = (total.log() + maximum).masked_fill(empty, -math.inf).squeeze(-1)
    if keep is not None:
        weights = weights * keep * dropout_factor(dropout_p)
    if rounding is not None:
        return _RoundedAttention.apply(weights.detach(), scores, value, rounding), logsumexp
    return weights @ value, logsumexp


class _RoundedAttention(torch.autograd.Function):
    """weights @ value with the roundings that every fused kernel in half precision makes.

    The weights and the scores' gradient enter their products in that precision, and the term that
    makes each row of the scores' gradient sum to 0 is taken from the rounded output.
    """

    @staticmethod
    def forward(ctx, weights, scores, value, dtype):  # type: ignore[no-untyped-def]
        rounded = weights.to(dtype).double()
        out = rounded @ value
        ctx.save_for_backward(weights, rounded, value, out.to(dtype).double())
        ctx.dtype = dtype
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weights, rounded, value, out = ctx.saved_tensors
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ value.transpose(-2, -1) - delta)
        grad_scores = grad_scores.to(ctx.dtype).double()
        grad_value = (rounded.transpose(-2, -1) @ grad).sum_to_size(value.shape)
        return None, grad_scores, grad_value, None


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """||actual - expected|| / ||expected||, in float64; 0 for two zeros, inf for NaN.

    floor: the least norm to divide by, for what is zero but for rounding.
    """
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    if not math.isfinite(difference):
        return math.inf
    if difference == 0:
        return 0.0
    norm = max(float(torch.linalg.vector_norm(expected.detach().double())), floor)
    return float(difference) / norm if norm else math.inf
