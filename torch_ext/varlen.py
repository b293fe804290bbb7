"""Attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["varlen_attn"]

_varlen_attention = torch.ops.torch_ext.varlen_attention.default


class _AuxRequest(Protocol):
    lse: bool


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: _AuxRequest | Any | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence to itself, sequences laid end to end.

    Means what ``torch.nn.attention.varlen.varlen_attn`` means, and takes more: float32 and float64,
    dropout, a soft cap, ALiBi, sinks, and ``seqused_k`` in training. A sequence has the same bits
    alone and in any batch (with dropout: in any batch where it has the same position).

    Args:
        query: (total_q, heads, head_dim), float32, float64, bfloat16 or float16; any strides.
        key: (total_k, kv_heads, head_dim), or with block_table pages of a cache, (pages, page_size,
            kv_heads, head_dim): of query's dtype, int8 or float8_e4m3fn.
        value: (total_k, kv_heads, value_dim), or pages.
        cu_seq_q: int32 or int64, (sequences + 1): sequence i has the queries from
            ``cu_seq_q[i]`` to ``cu_seq_q[i + 1]``. Begins with 0. Rows of query behind the last
            sequence give 0.
        cu_seq_k: likewise for keys and values. With block_table only the lengths count, and None
            goes with seqused_k.
        max_q: the number of queries of the longest sequence, or more.
        max_k: the number of keys of the longest sequence, or more.
        return_aux: ``torch.nn.attention.varlen.AuxRequest(lse=True)`` also returns logsumexp.
        scale: 1 / sqrt(head_dim) by default.
        window_size: (left, right): query i of q_len attends to the keys
            ``i + kv_len - q_len - left`` to ``i + kv_len - q_len + right``; -1: unbounded. (-1, 0)
            is causal.
        enable_gqa: kv_heads may be any divisor of heads.
        seqused_k: int32 or int64, (sequences): only so many of each sequence's keys take part.
        block_table: int32, (sequences, pages): the pages of each sequence in their order. Entries
            behind the used length are never read. For inference only.
        num_splits: taken for the sake of the signature; how a sequence's keys are split depends on
            the sequence alone.
        dropout_p: probability in [0, 1] of dropping a weight, drawn from torch's generator.
        softcap: ``softcap * tanh(score / softcap)`` replaces each score where it is > 0.
        alibi_slopes: float32, (heads) or (sequences, heads): ``-slope * |i + kv_len - q_len - j|``
            is added to the scores.
        sink: (heads), floating and differentiable: ``exp(sink)`` is added to softmax's denominator.
        k_scale: float32, () or (kv_heads), with an int8 or float8 cache, whose keys are
            ``stored * k_scale``.
        v_scale: likewise for values.

    Returns:
        out (total_q, heads, value_dim), or (out, logsumexp) with logsumexp (heads, total_q) in
        float32, float64 for float64. Both are differentiable, twice. A query that attends to
        nothing gives 0, and logsumexp -inf, or its sink.

    Raises:
        RuntimeError: naming the argument, what it takes and what it got.
        NotImplementedError: under forward-mode automatic differentiation, or on CUDA tensors.
    """
    if num_splits is not None and num_splits < 0:
        raise ValueError(
            f"torch_ext.varlen_attn: num_splits takes None or a number from 0 on, got {num_splits}"
        )
    if len(window_size) != 2:
        raise ValueError(
            "torch_ext.varlen_attn: window_size takes two numbers, (left, right), got "
            f"{tuple(window_size)}"
        )
    out, logsumexp = _varlen_attention(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        dropout_p,
        scale=scale,
        window_size=window_size,
        enable_gqa=enable_gqa,
        seqused_k=seqused_k,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink=sink,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if return_aux is not None and return_aux.lse:
        return out, logsumexp
    return out
