"""logsumexp is an output like any other: its gradient, and what it is for, merging parts."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, AttentionCase, check_result
from attention_cases import AttentionResult as Result
from attention_reference import attention, relative_error
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor

CASES = [
    AttentionCase((2, 3, 37, 24), (2, 3, 70, 24)),
    AttentionCase((2, 3, 1, 24), (2, 3, 70, 24)),
    AttentionCase((37, 24), (70, 24)),
    AttentionCase((3, 37, 24), (3, 70, 24), mask=(37, 70)),
    AttentionCase((2, 2, 3, 37, 24), (2, 2, 3, 70, 24), is_causal=True),
    AttentionCase((2, 6, 37, 24), (2, 2, 70, 24), (2, 2, 70, 8), enable_gqa=True),
    AttentionCase((2, 3, 37, 24), (2, 3, 70, 24), mask=(2, 1, 1, 70), mask_dtype=torch.bool),
    AttentionCase((2, 3, 37, 24), (1, 3, 70, 24), padding=(2, 70), mask=(3, 1, 70)),
    AttentionCase((2, 3, 37, 24), (2, 3, 70, 24), scale=-0.3),
]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("of", ["logsumexp", "both"])
def test_gradient(of: str, case: AttentionCase, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    twins = tensors.double()
    out, logsumexp = torch.ops.torch_ext.attention_forward(
        *tensors.inputs, key_padding_mask=tensors.key_padding_mask, **case.options
    )
    expected_out, expected_logsumexp = attention(
        *twins.inputs, key_padding_mask=twins.key_padding_mask, **case.options
    )
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grad_out, grad_logsumexp = torch.randn(out.shape), torch.randn(logsumexp.shape)
    outs, expected_outs = [logsumexp], [expected_logsumexp]
    grads = [grad_logsumexp.to(logsumexp.dtype)]
    if of == "both":
        outs, expected_outs = [out, logsumexp], [expected_out, expected_logsumexp]
        grads = [grad_out.to(dtype), *grads]
    actual = _gradients(outs, tensors.differentiable, grads)
    expected = _gradients(expected_outs, twins.differentiable, [g.double() for g in grads])
    if of == "logsumexp":
        # value has no part in it: None or zeros.
        assert actual[2] is None or not actual[2].any()
        actual.pop(2), expected.pop(2)
    if dtype in (torch.float32, torch.float64):
        check_result(Result(out, actual), Result(expected_out, expected), dtype)
        return
    # delta is taken of the rounded output, as in every fused backward pass: a few roundings.
    bound = 4 * torch.finfo(dtype).eps
    for grad, exact in zip(actual, expected, strict=True):
        assert relative_error(grad, exact) <= bound


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to the union of disjoint sets of keys, from the attention to each."""
    logsumexp = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    out = sum(part[0] * (part[1] - logsumexp).exp()[..., None] for part in parts)
    return out, logsumexp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 90])
def test_two_halves_merge(q_len: int, is_causal: bool, dtype: torch.dtype) -> None:
    """Ring attention: each device has a part of the keys. Gradients flow through the merge."""
    tensors = AttentionCase((2, 3, q_len, 16), (2, 3, 90, 16)).tensors(dtype)
    op = torch.ops.torch_ext.attention_forward
    query, key, value = tensors.differentiable
    offset = 90 - q_len
    parts = [
        op(
            query,
            key[:, :, start : start + 45],
            value[:, :, start : start + 45],
            is_causal=is_causal,
            causal_offset=offset - start,
        )
        for start in (0, 45)
    ]
    if is_causal and q_len == 90:
        assert (parts[1][1][:, :, :45] == -math.inf).all()
    out, logsumexp = _merge(parts)
    whole_out, whole_logsumexp = op(query, key, value, is_causal=is_causal, causal_offset=offset)
    assert_same_but_for_rounding(out, whole_out)
    assert_same_but_for_rounding(logsumexp, whole_logsumexp)

    grads = [torch.randn_like(out), torch.randn_like(logsumexp)]
    merged = torch.autograd.grad([out, logsumexp], tensors.differentiable, grads)
    whole = torch.autograd.grad([whole_out, whole_logsumexp], tensors.differentiable, grads)
    assert_same_but_for_rounding(merged, whole)


def test_dropout_leaves_logsumexp_alone() -> None:
    query, key, value = (torch.randn(2, 3, 37, 24) for _ in range(3))
    op = torch.ops.torch_ext.attention_forward
    dropped = op(query, key, value, dropout_p=0.5, dropout_seed=torch.tensor([7]))
    assert torch.equal(dropped[1], op(query, key, value)[1])
