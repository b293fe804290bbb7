"""merge_attention: parts of the keys are the whole."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES
from rounding_bounds import assert_same_but_for_rounding

import torch_ext


def _whole_and_merged(tensors, cuts):
    query, key, value = tensors
    whole = torch_ext.attention_forward(query, key, value)
    parts = [
        torch_ext.attention_forward(query, k, v)
        for k, v in zip(key.split(cuts, -2), value.split(cuts, -2), strict=True)
    ]
    return whole, torch_ext.merge_attention(*zip(*parts, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[30], [10, 20], [1, 28, 1]], ids=str)
def test_parts_are_the_whole(cuts, dtype):
    shapes = ((2, 3, 9, 8), (2, 3, 30, 8), (2, 3, 30, 8))
    tensors = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    results = []
    for out, logsumexp in _whole_and_merged(tensors, cuts):
        weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in (out, logsumexp)]
        loss = (out.float() * weights[0]).sum() + (logsumexp.float() * weights[1]).sum()
        results.append([out, logsumexp, *torch.autograd.grad(loss, tensors)])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert_same_but_for_rounding(results[1], results[0], dtype)


def test_rows_without_keys_stay_empty():
    outs = [torch.zeros(2, 4, requires_grad=True), torch.tensor([[0.0] * 4, [1.0] * 4])]
    logsumexps = [
        torch.full((2,), -torch.inf, requires_grad=True),
        torch.tensor([-torch.inf, 0.5], requires_grad=True),
    ]
    out, logsumexp = torch_ext.merge_attention(outs, logsumexps)
    assert torch.equal(out, outs[1])
    assert torch.equal(logsumexp, logsumexps[1])
    finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
    for grad in torch.autograd.grad(out.sum() + finite.sum(), [outs[0], *logsumexps]):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("outs", "logsumexps", "message"),
    [
        ([], [], "one tensor for each part, at least one, got 0 and 0"),
        ([torch.ones(2, 3)], [], "got 1 and 0"),
        ([torch.ones(2, 3), torch.ones(2, 4)], [torch.ones(2)] * 2, r"outs\[1\] takes the shape"),
        ([torch.ones(2, 3)], [torch.ones(3)], r"logsumexps\[0\] takes the shape of outs without"),
    ],
)
def test_refusals(outs, logsumexps, message):
    with pytest.raises(ValueError, match=message):
        torch_ext.merge_attention(outs, logsumexps)
