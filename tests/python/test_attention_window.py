"""window_size and causal_lower_right: which keys a query sees, forward, backward, twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES
from option_checks import call_tensors, check_options, check_second_order

import torch_ext

WINDOWS = [(0, 0), (3, 0), (16, -1), (-1, 5), (7, 9), (100, 100), (1000, -1)]


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(window: tuple[int, int], is_causal: bool, lower_right: bool) -> None:
    tensors = call_tensors((2, 4, 37, 16), (2, 2, 150, 16))
    check_options(
        *tensors,
        enable_gqa=True,
        is_causal=is_causal,
        window_size=window,
        causal_lower_right=lower_right,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (3, 200), (130, 130), (70, 9), (9, 70)])
def test_lengths_and_dtypes(q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    tensors = call_tensors((1, 2, q_len, 24), (1, 2, kv_len, 24), dtype)
    check_options(*tensors, is_causal=True, window_size=(20, 0), causal_lower_right=True)


def test_a_window_is_its_mask() -> None:
    query, key, value = (t.detach() for t in call_tensors((1, 2, 60, 8), (1, 2, 80, 8)))
    distance = torch.arange(80) - torch.arange(60)[:, None] - 20
    mask = (distance >= -9) & (distance <= 4)
    ours = torch_ext.scaled_dot_product_attention(
        query, key, value, window_size=(9, 4), causal_lower_right=True
    )
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, mask))


def test_together_with_masks_and_padding() -> None:
    tensors = call_tensors((2, 2, 40, 8), (2, 2, 50, 8))
    check_options(*tensors, torch.rand(40, 50) < 0.8, window_size=(8, 3))
    check_options(*tensors, torch.randn(2, 1, 40, 50, requires_grad=True), window_size=(8, 3))
    check_options(*tensors, window_size=(30, 0), key_padding_mask=torch.rand(2, 50) < 0.3)


def test_rows_outside_of_all_keys_give_zero() -> None:
    query, key, value = call_tensors((1, 1, 40, 8), (1, 1, 10, 8))
    out, logsumexp = torch_ext.attention_forward(query, key, value, window_size=(5, 0))
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert torch.equal(out[..., 15:, :], torch.zeros(1, 1, 25, 8))
    assert torch.equal(logsumexp[..., 15:], torch.full((1, 1, 25), -torch.inf))
    assert torch.equal(grads[0][..., 15:, :], torch.zeros(1, 1, 25, 8))
    check_options(query, key, value, window_size=(5, 0))


def test_offsets_far_outside() -> None:
    query, key, value = call_tensors((1, 1, 8, 8), (1, 1, 8, 8))
    for offset in (-(2**62), -50, 50, 2**62):
        out, _ = torch_ext.attention_forward(
            query, key, value, is_causal=True, causal_offset=offset, window_size=(20, -1)
        )
        assert torch.equal(out, torch.zeros_like(out)), offset


def test_twice() -> None:
    tensors = call_tensors((2, 2, 6, 4), (2, 2, 9, 4), torch.float64)
    check_second_order(*tensors, window_size=(2, 1), causal_lower_right=True)
    check_second_order(*tensors, is_causal=True, window_size=(3, -1), causal_offset=2)


def test_self_attention() -> None:
    x = torch.randn(2, 30, 16, requires_grad=True)
    parameters = [
        torch.randn(s, requires_grad=True) / 4 for s in ((48, 16), (48,), (16, 16), (16,))
    ]
    distance = torch.arange(30) - torch.arange(30)[:, None]
    mask = (distance >= -4) & (distance <= 0)
    ours = torch_ext.self_attention(x, *parameters, 2, is_causal=True, window_size=(4, -1))
    masked = torch_ext.self_attention(x, *parameters, 2, mask)
    torch.testing.assert_close(ours, masked)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, masked)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("window", [(-2, 0), (0, -5)])
def test_refusals(window: tuple[int, int]) -> None:
    tensors = call_tensors((1, 1, 4, 4), (1, 1, 4, 4))
    with pytest.raises(RuntimeError, match=r"window_size takes \(left, right\) .* or -1 for no"):
        torch_ext.scaled_dot_product_attention(*tensors, window_size=window)
