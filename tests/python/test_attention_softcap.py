"""softcap: scores become softcap * tanh(scores / softcap), forward, backward, twice."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES
from option_checks import call_tensors, check_options, check_second_order

import torch_ext


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 3, 70])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(softcap: float, q_len: int, dtype: torch.dtype) -> None:
    tensors = call_tensors((2, 4, q_len, 24), (2, 2, 130, 24), dtype)
    check_options(*tensors, softcap=softcap, enable_gqa=True, scale=0.7)


def test_comes_before_the_mask() -> None:
    tensors = call_tensors((1, 2, 20, 8), (1, 2, 33, 8))
    check_options(*tensors, 3 * torch.randn(20, 33).requires_grad_(), softcap=1.0)
    check_options(*tensors, torch.rand(20, 33) < 0.5, softcap=1.0)


def test_saturated_scores_have_no_gradient() -> None:
    query, key, value = (t.detach() * 100 for t in call_tensors((1, 1, 9, 16), (1, 1, 40, 16)))
    query.requires_grad_()
    out = torch_ext.scaled_dot_product_attention(query, key, value, softcap=2.0)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert grad.isfinite().all()
    assert out.isfinite().all()


def test_twice() -> None:
    tensors = call_tensors((2, 4, 5, 4), (2, 2, 7, 4), torch.float64)
    mask = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    check_second_order(*tensors, mask, softcap=1.3, enable_gqa=True)


@pytest.mark.parametrize("softcap", [-1.0, math.nan, math.inf])
def test_refusals(softcap: float) -> None:
    tensors = call_tensors((1, 1, 4, 4), (1, 1, 4, 4))
    with pytest.raises(RuntimeError, match=r"softcap takes 0 \(none\) or a positive, finite"):
        torch_ext.scaled_dot_product_attention(*tensors, softcap=softcap)
