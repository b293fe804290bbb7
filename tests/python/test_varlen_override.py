"""torch's own varlen_attn on the CPU while the drop-in is on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from varlen_cases import cumulative

import torch_ext

varlen = pytest.importorskip("torch.nn.attention.varlen")

_LENS = (4, 0, 9)


def _operands() -> tuple[Tensor, ...]:
    query = torch.randn(sum(_LENS), 4, 32, requires_grad=True)
    key, value = (torch.randn(sum(_LENS), 2, 32, requires_grad=True) for _ in range(2))
    cu_seq = cumulative(_LENS)
    return query, key, value, cu_seq, cu_seq


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (3, 1)])
def test_forward_and_backward(window_size: tuple[int, int]) -> None:
    operands = _operands()
    options = {"window_size": window_size, "enable_gqa": True}
    with torch_ext.enabled():
        out, logsumexp = varlen.varlen_attn(
            *operands, 9, 9, return_aux=varlen.AuxRequest(lse=True), **options
        )
        grads = torch.autograd.grad(out.square().sum(), operands[:3])
    expected, expected_logsumexp = torch_ext.varlen_attn(
        *operands, 9, 9, return_aux=varlen.AuxRequest(lse=True), **options
    )
    assert torch.equal(out, expected)
    assert torch.equal(logsumexp, expected_logsumexp)
    expected_grads = torch.autograd.grad(expected.square().sum(), operands[:3])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_into_a_given_tensor() -> None:
    operands = [t.detach() for t in _operands()]
    target = torch.empty(sum(_LENS), 4, 32)
    with torch_ext.enabled():
        varlen.varlen_attn_out(target, *operands, 9, 9, enable_gqa=True)
    assert torch.equal(target, torch_ext.varlen_attn(*operands, 9, 9, enable_gqa=True))


def test_compiled() -> None:
    operands = _operands()

    def call(query: Tensor, key: Tensor, value: Tensor, *cu_seq: Tensor) -> Tensor:
        return varlen.varlen_attn(
            query, key, value, *cu_seq, 9, 9, window_size=(-1, 0), enable_gqa=True
        )

    with torch_ext.enabled():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out = compiled(*operands)
        grads = torch.autograd.grad(out.square().sum(), operands[:3])
        eager = call(*operands)
        expected = torch.autograd.grad(eager.square().sum(), operands[:3])
    assert torch.equal(out, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_torch_s_again_when_it_is_off() -> None:
    operands = _operands()
    with torch_ext.enabled():
        varlen.varlen_attn(*operands, 9, 9, enable_gqa=True)
    with pytest.raises(NotImplementedError):
        varlen.varlen_attn(*operands, 9, 9, enable_gqa=True)
