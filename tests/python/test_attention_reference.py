"""The formula of attention_reference.py against torch's own attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import AttentionCase, formula, stock
from attention_reference import attention, dropout_factor, relative_error

CASES = [
    AttentionCase((5, 8), (7, 8)),
    AttentionCase((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), mask=(5, 7)),
    AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), mask=(2, 1, 5, 7), mask_dtype=torch.bool),
    AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), is_causal=True, scale=-0.5),
    AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), is_causal=True, causal_offset=2),
    AttentionCase((2, 6, 5, 8), (2, 2, 7, 8), enable_gqa=True, scale=0.0),
    AttentionCase((2, 3, 5, 8), (2, 3, 7, 8), padding=(2, 7), mask=(1, 7)),
    AttentionCase((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), mask=(2, 2, 1, 1, 7)),
    AttentionCase((1, 3, 5, 8), (2, 1, 7, 8), mask=(2, 3, 1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formula_is_torchs(case: AttentionCase) -> None:
    tensors = case.tensors(torch.float64)
    with torch.no_grad():
        out, _ = attention(*tensors.inputs, enable_gqa=case.enable_gqa)
    grad_out = torch.randn_like(out)
    actual, expected = formula(case, tensors, grad_out), stock(case, tensors, grad_out)
    assert relative_error(actual.out, expected.out) < 1e-14
    for mine, theirs in zip(actual.grads, expected.grads, strict=True):
        assert relative_error(mine, theirs, floor=1.0) < 1e-13


def test_logsumexp() -> None:
    query, key, value = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    _, logsumexp = attention(query, key, value)
    torch.testing.assert_close(logsumexp, torch.logsumexp(query @ key.T / math.sqrt(6), -1))


def test_row_without_keys() -> None:
    tensors = AttentionCase((4, 6), (5, 6), mask=(4, 5)).tensors(torch.float64)
    with torch.no_grad():
        tensors.attn_mask[2] = -math.inf
    out, logsumexp = attention(*tensors.inputs)
    assert torch.equal(out[2], torch.zeros(6))
    assert logsumexp[2] == -math.inf
    grads = torch.autograd.grad(out.sum() + logsumexp[:2].sum(), tensors.differentiable)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][2].any()
    assert not grads[3][2].any()


def test_dropout_factor() -> None:
    assert dropout_factor(0.0) == 1.0
    assert dropout_factor(1.0) == 0.0
    assert abs(dropout_factor(0.1) - 1 / 0.9) < 1e-5
