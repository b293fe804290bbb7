"""flash-attn 2's functions, with its names, argument order, layouts and defaults.

``from torch_ext.flash_attn import flash_attn_func`` in place of ``from flash_attn import
flash_attn_func``. Tensors are (batch, seq, heads, head_dim); causal and window count from the lower
right corner. Beyond flash-attn: the CPU, float32 and float64, and any head_dim. Flash-attn 2 is
Dao, arXiv 2307.08691; the functions are those of its package, version 2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext.attention import attention_forward
from torch_ext.paged_cache import append_kv_
from torch_ext.varlen import varlen_attn

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


class _WithLogsumexp:
    lse = True


def _window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    left, right = window_size
    return (left, 0 if causal else right)


def _refuse_probabilities(function: str, wanted: bool, dropout_p: float) -> None:
    if wanted and dropout_p > 0.0:
        raise NotImplementedError(
            f"torch_ext.flash_attn.{function}: return_attn_probs takes False with dropout_p > 0: "
            "no matrix of probabilities is made; got True"
        )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of (batch, seq, heads, head_dim) tensors.

    Args:
        q: (batch, q_len, heads, head_dim).
        k: (batch, kv_len, kv_heads, head_dim), kv_heads a divisor of heads.
        v: (batch, kv_len, kv_heads, value_dim).
        dropout_p: probability of dropping a weight.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: query i attends to keys ``j <= i + kv_len - q_len``.
        window_size: (left, right): query i attends to the keys ``i + kv_len - q_len - left`` to
            ``i + kv_len - q_len + right``; -1: unbounded.
        softcap: ``softcap * tanh(score / softcap)`` replaces each score where it is > 0.
        alibi_slopes: float32, (heads) or (batch, heads).
        deterministic: taken for the sake of the signature; results always are.
        return_attn_probs: also returns logsumexp (batch, heads, q_len), and None for the matrix of
            probabilities, which flash-attn fills for tests of dropout alone.

    Returns:
        (batch, q_len, heads, value_dim), differentiable.
    """
    del deterministic
    _refuse_probabilities("flash_attn_func", return_attn_probs, dropout_p)
    out, logsumexp = attention_forward(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=dropout_p,
        scale=softmax_scale,
        enable_gqa=True,
        window_size=_window(causal, window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal_lower_right=True,
    )
    out = out.transpose(1, 2)
    return (out, logsumexp, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of packed sequences: see ``torch_ext.varlen_attn``.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, kv_heads, head_dim), or pages (pages, page_size, kv_heads, head_dim).
        v: (total_k, kv_heads, value_dim), or pages.
        cu_seqlens_q, cu_seqlens_k: int32, (batch + 1): where each sequence begins.
        max_seqlen_q, max_seqlen_k: the lengths of the longest sequences, or more.
        block_table: int32, (batch, pages): each sequence's pages in their order.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in flash_attn_func.

    Returns:
        (total_q, heads, value_dim), differentiable where there is no block_table.
    """
    del deterministic
    _refuse_probabilities("flash_attn_varlen_func", return_attn_probs, dropout_p)
    result = varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        return_aux=_WithLogsumexp,
        scale=softmax_scale,
        window_size=_window(causal, window_size),
        enable_gqa=True,
        block_table=block_table,
        dropout_p=dropout_p,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    out, logsumexp = result
    return (out, logsumexp, None) if return_attn_probs else out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (batch, seq, heads, head_dim) with its first ``2 * cos.size(1)`` columns rotated.

    Su et al., RoFormer, arXiv 2104.09864. positions: (batch, seq), rows of cos and sin.
    """
    width = 2 * cos.size(1)
    cos, sin = (table[positions][:, :, None, :].to(torch.float32) for table in (cos, sin))
    turned = x[..., :width].to(torch.float32)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    pairs = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values, to which k and v are appended first, in place.

    For inference: no gradients.

    Args:
        q: (batch, q_len, heads, head_dim).
        k_cache: (batch_cache, cache_len, kv_heads, head_dim), or with block_table pages
            (pages, page_size, kv_heads, head_dim), any page_size.
        v_cache: likewise with value_dim.
        k: (batch, new_len, kv_heads, head_dim), written to the rows from cache_seqlens on.
        v: likewise.
        rotary_cos: (rows, rotary_dim / 2): k is rotated by the rows from cache_seqlens on; q too
            where causal or a window is given, else by row cache_seqlens alone.
        rotary_sin: likewise.
        cache_seqlens: int32 (batch), or one number: the rows of the cache that are filled.
            None: all.
        cache_batch_idx: int32 (batch): which entry of the cache each batch entry reads. Not with
            block_table.
        cache_leftpad: int32 (batch): the first row that takes part.
        block_table: int32 (batch, pages): each entry's pages in their order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in flash_attn_func.
        rotary_interleaved: whether columns 2i and 2i + 1 are rotated together (GPT-J), or i and
            i + rotary_dim / 2 (GPT-NeoX).
        num_splits: taken for the sake of the signature.
        return_softmax_lse: also returns logsumexp (batch, heads, q_len).

    Returns:
        (batch, q_len, heads, value_dim).
    """
    name = "torch_ext.flash_attn.flash_attn_with_kvcache"
    batch, q_len = q.shape[:2]
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v take tensors together, or None together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{name}: rotary_cos and rotary_sin take tensors together, or None")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{name}: rotary_cos takes None where no k is appended, got a tensor")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError(f"{name}: cache_batch_idx takes None with a block_table, got a tensor")
    page_size = k_cache.size(1)
    pages = block_table
    if pages is None:
        # Each entry of the cache is one page.
        entries = cache_batch_idx
        if entries is None:
            if k_cache.size(0) < batch:
                raise ValueError(
                    f"{name}: k_cache takes an entry for each of {batch} batch entries, got "
                    f"{k_cache.size(0)}"
                )
            entries = torch.arange(batch, device=q.device)
        pages = entries.to(torch.int32)[:, None]
    capacity = pages.size(1) * page_size
    if cache_seqlens is None:
        lengths = torch.full((batch,), capacity, dtype=torch.int64, device=q.device)
    elif isinstance(cache_seqlens, Tensor):
        lengths = cache_seqlens.to(torch.int64)
    else:
        lengths = torch.full((batch,), int(cache_seqlens), dtype=torch.int64, device=q.device)
    if lengths.shape != (batch,):
        raise ValueError(
            f"{name}: cache_seqlens takes a number or a tensor of shape ({batch},), got "
            f"{tuple(lengths.shape)}"
        )
    with torch.no_grad():
        new_len = 0
        if k is not None and v is not None:
            new_len = k.size(1)
            most = int(lengths.max()) + new_len if batch else 0
            if most > capacity or (batch and int(lengths.min()) < 0):
                raise ValueError(
                    f"{name}: cache_seqlens takes lengths from 0 on that leave room for {new_len} "
                    f"new rows in {capacity}, got {int(lengths.min())} to {int(lengths.max())}"
                )
            rows = lengths[:, None] + torch.arange(new_len, device=q.device)
            if rotary_cos is not None and rotary_sin is not None:
                k = _rotated(k, rotary_cos, rotary_sin, rows, rotary_interleaved)
                steps = torch.arange(q_len, device=q.device)
                if not causal and window_size == (-1, -1):
                    steps = torch.zeros_like(steps)
                q = _rotated(
                    q, rotary_cos, rotary_sin, lengths[:, None] + steps, rotary_interleaved
                )
            new_pages = pages.to(torch.int64).gather(1, rows // page_size)
            if bool((new_pages < 0).any()):
                raise ValueError(
                    f"{name}: block_table takes pages from 0 on where new rows go, got "
                    f"{int(new_pages.min())}"
                )
            slots = new_pages * page_size + rows % page_size
            append_kv_(k_cache, v_cache, k.flatten(0, 1), v.flatten(0, 1), slots.flatten())
        used = lengths + new_len
        out, logsumexp = torch.ops.torch_ext.varlen_attention_forward(
            q.flatten(0, 1),
            k_cache,
            v_cache,
            torch.arange(batch + 1, device=q.device) * q_len,
            None,
            q_len,
            capacity,
            scale=softmax_scale,
            window_size=_window(causal, window_size),
            enable_gqa=True,
            seqused_k=used,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            block_table=pages,
            leftpad_k=cache_leftpad,
        )
    out = out.unflatten(0, (batch, q_len))
    if return_softmax_lse:
        return out, logsumexp.unflatten(1, (batch, q_len)).transpose(0, 1)
    return out
