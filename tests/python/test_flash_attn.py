"""flash-attn 2's functions: layouts, the lower right corner, caches."""

from __future__ import annotations

import inspect

import pytest
import torch
from attention_reference import attention
from torch import Tensor
from varlen_cases import cumulative

from torch_ext.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, **options: object) -> Tensor:
    """(batch, seq, heads, head_dim)"""
    left, right = options.pop("window_size", (-1, -1))
    out, _ = attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        enable_gqa=True,
        window_size=(left, 0 if causal else right),
        causal_lower_right=True,
        **options,
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (7, 3)])
def test_dense(causal: bool, window_size: tuple[int, int]) -> None:
    q = torch.randn(2, 20, 4, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 31, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    slopes = torch.rand(2, 4)
    out, logsumexp, probabilities = flash_attn_func(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        softcap=3.0,
        alibi_slopes=slopes,
        return_attn_probs=True,
    )
    expected = _reference(
        q, k, v, causal, window_size=window_size, softcap=3.0, alibi_slopes=slopes
    )
    torch.testing.assert_close(out, expected)
    assert logsumexp.shape == (2, 4, 20)
    assert probabilities is None
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for mine, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_varlen() -> None:
    lens = [5, 12, 1]
    q = torch.randn(sum(lens), 4, 16)
    k, v = torch.randn(2, sum(lens), 2, 16).unbind()
    cu_seqlens = cumulative(lens)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12, causal=True)
    first = 0
    for length in lens:
        rows = slice(first, first + length)
        first += length
        expected = _reference(*(t[rows][None] for t in (q, k, v)), True)[0]
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-5)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool, still: bool
) -> Tensor:
    result = x.clone()
    width = cos.size(1)
    for step in range(x.size(0)):
        row = first if still else first + step
        for pair in range(width):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width)
            c, s = cos[row, pair], sin[row, pair]
            result[step, :, a] = x[step, :, a] * c - x[step, :, b] * s
            result[step, :, b] = x[step, :, a] * s + x[step, :, b] * c
    return result


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rotary", [None, True, False], ids=["plain", "interleaved", "halves"])
@pytest.mark.parametrize("causal", [False, True])
def test_cache(causal: bool, rotary: bool | None, paged: bool) -> None:
    batch, capacity, lengths, leftpad, new = 3, 24, [5, 0, 17], [2, 0, 9], 4
    q = torch.randn(batch, new, 4, 16)
    k, v = torch.randn(2, batch, new, 2, 16).unbind()
    full_k, full_v = torch.randn(2, batch, capacity, 2, 16).unbind()
    cos, sin = torch.randn(2, capacity, 4).unbind()
    options: dict[str, object] = {}
    if paged:
        table = torch.randperm(batch * 4).reshape(batch, 4)[:, :3].to(torch.int32)
        k_cache, v_cache = torch.zeros(2, batch * 4, 8, 2, 16).unbind()
        for index in range(batch):
            for page in range(3):
                rows = slice(page * 8, page * 8 + 8)
                k_cache[table[index, page]] = full_k[index, rows]
                v_cache[table[index, page]] = full_v[index, rows]
        options["block_table"] = table
    else:
        order = torch.tensor([2, 0, 1], dtype=torch.int32)
        k_cache, v_cache = torch.zeros(2, batch, capacity, 2, 16).unbind()
        k_cache[order.long()], v_cache[order.long()] = full_k, full_v
        options["cache_batch_idx"] = order
    if rotary is not None:
        options.update(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=rotary)
    out, logsumexp = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
        causal=causal,
        return_softmax_lse=True,
        **options,
    )
    assert logsumexp.shape == (batch, 4, new)
    for index, (length, pad) in enumerate(zip(lengths, leftpad, strict=True)):
        mine, key = q[index], k[index]
        if rotary is not None:
            mine = _rotate(mine, cos, sin, length, rotary, still=not causal)
            key = _rotate(key, cos, sin, length, rotary, still=False)
        keys = torch.cat([full_k[index, :length], key])
        values = torch.cat([full_v[index, :length], v[index]])
        expected = _reference(mine[None], keys[None, pad:], values[None, pad:], causal)[0]
        torch.testing.assert_close(out[index].double(), expected, rtol=1e-5, atol=1e-5)
        if not paged:
            stored = k_cache[int(options["cache_batch_idx"][index])]
            torch.testing.assert_close(stored[: length + new], keys)
            assert torch.equal(stored[length + new :], full_k[index, length + new :])


def test_one_number_for_all_lengths() -> None:
    q = torch.randn(2, 1, 4, 16)
    k_cache, v_cache = torch.randn(2, 2, 10, 4, 16).unbind()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=6)
    expected = _reference(q, k_cache[:, :6], v_cache[:, :6], False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_signatures_are_flash_attn_s() -> None:
    assert list(inspect.signature(flash_attn_func).parameters) == [
        *("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap"),
        *("alibi_slopes", "deterministic", "return_attn_probs"),
    ]
    assert list(inspect.signature(flash_attn_with_kvcache).parameters) == [
        *("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"),
        *("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal"),
        *("window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits"),
        "return_softmax_lse",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 1, 4, 16)}, "k and v take tensors together"),
        ({"rotary_cos": torch.zeros(10, 4)}, "rotary_cos and rotary_sin take tensors together"),
        ({"cache_seqlens": torch.tensor([1, 2, 3])}, "cache_seqlens takes a number or a tensor"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    caches = torch.zeros(2, 2, 10, 4, 16).unbind()
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(torch.zeros(2, 1, 4, 16), *caches, **changes)


def test_no_room_in_the_cache() -> None:
    caches = torch.zeros(2, 2, 10, 4, 16).unbind()
    rows = torch.zeros(2, 3, 4, 16)
    with pytest.raises(ValueError, match="leave room for 3 new rows in 10, got 8 to 8"):
        flash_attn_with_kvcache(torch.zeros(2, 3, 4, 16), *caches, rows, rows, cache_seqlens=8)
