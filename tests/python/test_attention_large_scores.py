"""Scores of any size, and rows of nothing but huge finite masks, against the formula in float64.

Stock torch computes both passes from the same scores, so that its weights are right up to the
rounding of the scores themselves. The error of every result is compared with stock's.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    DTYPES,
    HALF_DTYPES,
    AttentionCase,
    formula,
    fused,
    stock,
)
from attention_reference import relative_error
from rounding_bounds import assert_no_further
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [
    AttentionCase((4, 4, 64, 64), (4, 4, 64, 64)),
    AttentionCase((2, 4, 130, 40), (2, 4, 300, 40)),
    AttentionCase((2, 4, 70, 64), (2, 4, 70, 64), is_causal=True),
    AttentionCase((2, 4, 40, 64), (2, 4, 90, 64), mask=(40, 90)),
    AttentionCase((2, 4, 40, 64), (2, 4, 90, 64), mask=(40, 90), mask_dtype=torch.bool),
    # At most four rows: the decoding kernel, and the backward pass that makes the same scores.
    AttentionCase((64, 8, 1, 64), (64, 8, 100, 64)),
    AttentionCase((32, 8, 3, 40), (32, 8, 90, 40)),
    AttentionCase((32, 16, 1, 64), (32, 4, 100, 64), enable_gqa=True),
    AttentionCase((2, 2, 16, 32), (2, 2, 1100, 32)),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_of_large_scores_are_stocks(case: AttentionCase, dtype: torch.dtype) -> None:
    for magnitude in (3.0, 10.0, 30.0, 100.0, 1000.0, 1e5):
        if dtype is torch.float16 and magnitude > 1e4:
            continue
        # Few rows in all: one that is nearly a tie decides the norm (test_attention_near_ties.py).
        if 30.0 <= magnitude <= 100.0 and case.query[-2] < 16:
            continue
        tensors = case.tensors(dtype)
        with torch.no_grad():
            tensors.query *= magnitude
            tensors.key *= magnitude
        grad_out = torch.randn(*case.query[:-1], case.value_shape[-1]).to(dtype)
        theirs = stock(case, tensors, grad_out).named()
        # torch 2.15's fused passes make different scores of some shapes: NaN at 1e10.
        if not all(result.isfinite().all() for result in theirs.values()):
            with sdpa_kernel(SDPBackend.MATH):
                theirs = stock(case, tensors, grad_out).named()
        ours, exact = (which(case, tensors, grad_out).named() for which in (fused, formula))
        assert_no_further(ours, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [10.0, 1000.0])
@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_weights_of_a_row_add_up_to_one(q_len: int, magnitude: float, dtype: torch.dtype) -> None:
    """grad_out is 1, so that the gradient of value has the weights' sums over the queries."""
    tensors = AttentionCase((2, 3, q_len, 40), (2, 3, 300, 40)).tensors(dtype)
    with torch.no_grad():
        tensors.query *= magnitude
        tensors.key *= magnitude
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs)
    (grad_value,) = torch.autograd.grad(out, tensors.value, torch.ones_like(out))
    sums = grad_value.double().sum(-2)
    # float32: as logsumexp is rounded where it is 512 and more; others: once, to the dtype.
    bound = {torch.float32: 4e-5, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(sums, torch.full_like(sums, q_len), rtol=bound, atol=0.0)


@pytest.mark.parametrize("q_len", [1, 3, 70])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, -1e9),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.bfloat16, -1e9),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.float64, torch.finfo(torch.float64).min),
    ],
    ids=str,
)
def test_rows_of_huge_finite_masks_are_averages(
    dtype: torch.dtype, value: float, q_len: int
) -> None:
    """The mask leaves no room for a score: equal weights, in the backward pass too."""
    case = AttentionCase((2, 3, q_len, 16), (2, 3, 90, 16), mask=(2, 1, q_len, 90))
    tensors = case.tensors(dtype)
    assert tensors.attn_mask is not None
    mask = torch.zeros(2, 1, q_len, 90, dtype=dtype)
    mask[0] = value
    mask[1, :, ::2, :40] = value
    tensors.attn_mask = mask
    grad_out = torch.randn(2, 3, q_len, 16).to(dtype)
    actual = fused(case, tensors, grad_out)

    # The same in float64 with a mask that leaves none there.
    tensors.attn_mask = mask.double().masked_fill(mask != 0, torch.finfo(torch.float64).min)
    expected = formula(case, tensors, grad_out)
    for name, exact in expected.named().items():
        error = relative_error(actual.named()[name], exact)
        assert error <= 16 * torch.finfo(dtype).eps, name
    grad_value = actual.grads[2]
    torch.testing.assert_close(
        grad_value[0].double(),
        (grad_out[0].double().sum(-2, keepdim=True) / 90).expand(3, 90, 16),
        rtol=4 * torch.finfo(dtype).eps,
        atol=16 * torch.finfo(dtype).eps,
    )


def test_logsumexp_of_other_keys_too_is_kept() -> None:
    """The backward operator takes logsumexp as given, that of more keys than it sees, too."""
    query, key, value, grad_out = (torch.randn(2, 3, 40, 16) for _ in range(4))
    query, key = query * 60, key * 60
    out, logsumexp = torch.ops.torch_ext.attention_forward(query, key, value)
    alone, joined = (
        torch.ops.torch_ext.attention_backward(grad_out, None, query, key, value, out, given)[2]
        for given in (logsumexp, logsumexp + 8.0)
    )
    torch.testing.assert_close(joined, alone * torch.exp(torch.tensor(-8.0)), rtol=1e-2, atol=1e-5)
