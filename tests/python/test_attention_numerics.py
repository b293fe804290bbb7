"""Output, logsumexp and gradients of every shape against the formula in float64.

float32 and float64 to fixed tolerances; bfloat16 and float16 no worse than torch's own attention.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, HALF_DTYPES, AttentionCase, check_case, check_logsumexp
from attention_reference import attention

# The forms that calls take. Lengths are neither powers of two nor equal, unless that is the point.
SHAPES = [
    # 2-D to 5-D, and the most that there can be
    AttentionCase((37, 24), (45, 24)),
    AttentionCase((5, 37, 24), (5, 45, 24)),
    AttentionCase((3, 5, 37, 24), (3, 5, 45, 24)),
    AttentionCase((2, 3, 5, 37, 24), (2, 3, 5, 45, 24)),
    AttentionCase((2, 1, 2, 1, 2, 9, 8), (2, 1, 2, 1, 2, 11, 8)),
    # broadcast batches and heads
    AttentionCase((1, 4, 33, 16), (3, 4, 35, 16)),
    AttentionCase((3, 4, 33, 16), (1, 4, 35, 16)),
    AttentionCase((3, 4, 33, 16), (3, 4, 35, 16), (1, 4, 35, 16)),
    AttentionCase((3, 4, 33, 16), (1, 4, 35, 16), (3, 4, 35, 16)),
    AttentionCase((3, 4, 33, 16), (3, 1, 35, 16)),
    AttentionCase((3, 1, 33, 16), (3, 4, 35, 16)),
    AttentionCase((3, 4, 33, 16), (3, 4, 35, 16), (3, 1, 35, 16)),
    AttentionCase((3, 4, 33, 16), (3, 1, 35, 16), (3, 4, 35, 16)),
    AttentionCase((2, 1, 4, 19, 16), (1, 3, 4, 21, 16), (1, 1, 4, 21, 16)),
    AttentionCase((2, 3, 4, 19, 16), (4, 21, 16), (21, 16)),
    AttentionCase((19, 16), (3, 4, 21, 16), (4, 21, 16)),
    # value_dim other than head_dim
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), (2, 3, 45, 40)),
    AttentionCase((2, 3, 37, 40), (2, 3, 45, 40), (2, 3, 45, 7)),
    AttentionCase((2, 3, 37, 8), (2, 3, 45, 8), (2, 3, 45, 1)),
    AttentionCase((1, 2, 21, 16), (1, 2, 23, 16), (1, 2, 23, 300)),
    AttentionCase((1, 2, 21, 300), (1, 2, 23, 300), (1, 2, 23, 16)),
    # lengths: one, tile edges, long keys that are split, long queries
    AttentionCase((2, 3, 1, 64), (2, 3, 1, 64)),
    AttentionCase((2, 3, 1, 64), (2, 3, 77, 64)),
    AttentionCase((2, 3, 77, 64), (2, 3, 1, 64)),
    AttentionCase((1, 2, 4, 40), (1, 2, 131, 40)),
    AttentionCase((1, 2, 5, 40), (1, 2, 131, 40)),
    AttentionCase((1, 2, 64, 32), (1, 2, 64, 32)),
    AttentionCase((1, 2, 65, 32), (1, 2, 63, 32)),
    AttentionCase((1, 2, 127, 32), (1, 2, 129, 32)),
    AttentionCase((1, 2, 257, 32), (1, 2, 255, 32)),
    AttentionCase((1, 1, 513, 16), (1, 1, 1027, 16)),
    AttentionCase((1, 1, 3, 32), (1, 1, 4099, 32)),
    AttentionCase((1, 1, 16, 32), (1, 1, 4099, 32)),
    AttentionCase((1, 1, 2100, 16), (1, 1, 5, 16)),
    AttentionCase((40, 3, 7, 16), (40, 3, 9, 16)),
    # grouped heads
    AttentionCase((2, 6, 37, 24), (2, 2, 45, 24), enable_gqa=True),
    AttentionCase((2, 6, 37, 24), (2, 1, 45, 24), enable_gqa=True),
    AttentionCase((6, 37, 24), (3, 45, 24), enable_gqa=True),
    AttentionCase((2, 6, 37, 24), (2, 6, 45, 24), enable_gqa=True),
    AttentionCase((1, 8, 1, 64), (1, 2, 300, 64), enable_gqa=True),
    AttentionCase((1, 32, 1, 32), (1, 4, 300, 32), enable_gqa=True),
    AttentionCase((2, 1, 6, 13, 24), (1, 3, 2, 15, 24), (2, 3, 2, 15, 8), enable_gqa=True),
    AttentionCase((2, 6, 37, 24), (2, 2, 37, 24), enable_gqa=True, is_causal=True),
    # causal: top left by default, any diagonal
    AttentionCase((2, 3, 61, 24), (2, 3, 61, 24), is_causal=True),
    AttentionCase((2, 3, 37, 24), (2, 3, 90, 24), is_causal=True),
    AttentionCase((2, 3, 90, 24), (2, 3, 37, 24), is_causal=True),
    AttentionCase((1, 2, 37, 24), (1, 2, 90, 24), is_causal=True, causal_offset=53),
    AttentionCase((1, 2, 90, 24), (1, 2, 37, 24), is_causal=True, causal_offset=-53),
    AttentionCase((1, 2, 37, 24), (1, 2, 90, 24), is_causal=True, causal_offset=-5),
    AttentionCase((1, 2, 37, 24), (1, 2, 90, 24), is_causal=True, causal_offset=1000),
    AttentionCase((1, 2, 37, 24), (1, 2, 90, 24), is_causal=True, causal_offset=-1000),
    AttentionCase((1, 2, 1, 24), (1, 2, 90, 24), is_causal=True),
    AttentionCase((1, 2, 3, 24), (1, 2, 90, 24), is_causal=True, causal_offset=87),
    AttentionCase((1, 1, 300, 16), (1, 1, 300, 16), is_causal=True),
    # scale
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), scale=0.5),
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), scale=0.0),
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), scale=-0.25),
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), scale=-0.25, is_causal=True),
    AttentionCase((2, 3, 2, 24), (2, 3, 45, 24), scale=-0.25),
    AttentionCase((2, 3, 37, 24), (2, 3, 45, 24), scale=8.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: AttentionCase, dtype: torch.dtype) -> None:
    check_case(case, dtype)


HEAD_DIMS = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    64,
    80,
    96,
    100,
    128,
    160,
    192,
    256,
    257,
    512,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check_case(AttentionCase((1, 2, 35, head_dim), (1, 2, 70, head_dim)), dtype)
    check_case(AttentionCase((1, 2, 1, head_dim), (1, 2, 70, head_dim)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((2, 4, 300, 64), (2, 4, 300, 64)),
        AttentionCase((2, 4, 300, 64), (2, 4, 300, 64), is_causal=True),
    ],
    ids=str,
)
def test_usual_sizes(case: AttentionCase, dtype: torch.dtype) -> None:
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
        ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
        ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((2, 3, 0, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 8)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((2, 3, 1, 0), (2, 3, 7, 0), (2, 3, 7, 8)),
        ((2, 3, 1, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((0, 8), (7, 8), (7, 8)),
        ((1, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
        ((5, 0, 8), (5, 7, 8), (5, 7, 3)),
    ],
    ids=str,
)
def test_zero_sized(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dtype: torch.dtype
) -> None:
    for is_causal in (False, True):
        case = AttentionCase(query, key, value, is_causal=is_causal)
        tensors = case.tensors(dtype)
        out, logsumexp = torch.ops.torch_ext.attention_forward(*tensors.inputs, **case.options)
        expected, expected_logsumexp = attention(*tensors.inputs, **case.options)
        assert out.shape == expected.shape
        assert logsumexp.shape == expected_logsumexp.shape
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(logsumexp.double(), expected_logsumexp, rtol=1e-2, atol=1e-2)
        out.sum().backward()
        expected_grads = torch.autograd.grad(expected.sum(), tensors.inputs[:3])
        for tensor, expected_grad in zip(tensors.inputs[:3], expected_grads, strict=True):
            torch.testing.assert_close(tensor.grad, expected_grad.to(dtype), rtol=0.05, atol=0.05)


def test_zero_keys_and_mask_gradient() -> None:
    """No keys: out is 0, and a mask that broadcasts over queries still gets its gradient."""
    tensors = AttentionCase((2, 3, 5, 8), (2, 3, 0, 8), mask=(3, 5, 1)).tensors(torch.float32)
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs)
    assert torch.equal(out, torch.zeros(2, 3, 5, 8))
    grads = torch.autograd.grad(out.sum(), tensors.differentiable)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert grads[3].shape == (3, 5, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 40])
def test_large_scores(q_len: int, dtype: torch.dtype) -> None:
    """Scores of some hundreds overflow exp() unless the maximum is taken off first."""
    query = torch.randn(2, q_len, 16, dtype=torch.float64)
    key = torch.randn(2, 70, 16, dtype=torch.float64)
    key[:, 33:35] *= 50  # the maximum comes in the middle, and is a near tie
    query, key = query.to(dtype), key.to(dtype)
    value = torch.randn(2, 70, 16).to(dtype)
    out, logsumexp = torch.ops.torch_ext.attention_forward(query, key, value, scale=1.0)
    expected, expected_logsumexp = attention(query, key, value, scale=1.0)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2 if dtype in HALF_DTYPES else 1e-4
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    check_logsumexp(logsumexp, expected_logsumexp, dtype)


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_spreads_to_the_rows_that_see_it(q_len: int, dtype: torch.dtype) -> None:
    tensors = AttentionCase((2, 3, q_len, 16), (2, 3, 70, 16)).tensors(dtype)
    query, key, value = (t.detach() for t in tensors.inputs[:3])
    plain = torch.ops.torch_ext.scaled_dot_product_attention(query, key, value)

    broken = query.clone()
    broken[0, 1, 0, 3] = math.nan
    out = torch.ops.torch_ext.scaled_dot_product_attention(broken, key, value)
    assert out[0, 1, 0].isnan().all()
    assert torch.equal(out[1], plain[1])
    assert torch.equal(out[0, 2], plain[0, 2])
    assert torch.equal(out[0, 1, 1:], plain[0, 1, 1:])

    broken = key.clone()
    broken[1, 2, 50, 3] = math.nan
    out = torch.ops.torch_ext.scaled_dot_product_attention(query, broken, value)
    assert out[1, 2].isnan().all()
    assert torch.equal(out[0], plain[0])
    assert torch.equal(out[1, :2], plain[1, :2])

    broken = value.clone()
    broken[1, 2, 50, 3] = math.nan
    out = torch.ops.torch_ext.scaled_dot_product_attention(query, key, broken)
    assert out[1, 2, :, 3].isnan().all()
    assert torch.equal(out[1, 2, :, 4:], plain[1, 2, :, 4:])


def test_nan_in_the_gradient_spreads() -> None:
    tensors = AttentionCase((2, 3, 40, 16), (2, 3, 70, 16)).tensors(torch.float32)
    out = torch.ops.torch_ext.scaled_dot_product_attention(*tensors.inputs)
    grad_out = torch.ones_like(out)
    grad_out[0, 1, 7, 3] = math.nan
    grad_query, grad_key, grad_value = torch.autograd.grad(out, tensors.differentiable, grad_out)
    assert grad_query[0, 1, 7].isnan().all()
    assert grad_query[0, 1, :7].isfinite().all()
    assert grad_key[0, 1].isnan().all()
    assert grad_key[1].isfinite().all()
    assert grad_value[0, 1, :, 3].isnan().all()
    assert grad_value[0, 2].isfinite().all()
