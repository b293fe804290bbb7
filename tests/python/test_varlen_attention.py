"""Packed sequences against the formula, sequence by sequence: values, gradients, bits."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import DTYPES, HALF_DTYPES, check_result
from attention_cases import AttentionResult as Result
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from varlen_cases import VarlenCase, cumulative, varlen_reference

import torch_ext

_RAGGED = ((5, 0, 64, 130, 1, 200), (5, 3, 64, 130, 7, 200))


class _Aux:
    lse = True


CASES = [
    VarlenCase(*_RAGGED),
    VarlenCase(*_RAGGED, window_size=(-1, 0)),
    VarlenCase(*_RAGGED, window_size=(20, 0), tail=(3, 2)),
    VarlenCase(*_RAGGED, window_size=(7, 9), softcap=2.0),
    VarlenCase(*_RAGGED, sink=True, alibi="heads"),
    VarlenCase(*_RAGGED, sink=True, alibi="sequences", window_size=(50, 0), softcap=3.0),
    VarlenCase(*_RAGGED, unused=True, sink=True),
    # At most 4 rows a pair of heads: the decoding kernel.
    VarlenCase((1, 1, 2, 1), (100, 1500, 7, 0)),
    VarlenCase((1, 1, 2, 1), (100, 1500, 7, 0), sink=True, alibi="heads", window_size=(60, 0)),
    VarlenCase((33,) * 5, (33,) * 5, heads=2, kv_heads=2, head_dim=64, value_dim=64),
    VarlenCase((17, 90), (40, 30), window_size=(-1, 0), heads=3, kv_heads=1),
    VarlenCase((0, 0), (4, 0), tail=(2, 0)),
]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: VarlenCase, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    twins = tensors.double()
    positional, options = tensors.arguments()
    out, logsumexp = torch_ext.varlen_attn(*positional, return_aux=_Aux, **options)
    expected_out, expected_logsumexp = varlen_reference(twins)
    assert out.dtype == dtype
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    empty = expected_logsumexp == -math.inf
    assert torch.equal(logsumexp == -math.inf, empty)
    torch.testing.assert_close(
        logsumexp[~empty].double(), expected_logsumexp[~empty], rtol=1e-5, atol=1e-5
    )
    grad_out = torch.randn(out.shape)
    actual = _gradients([out], tensors.differentiable, [grad_out.to(dtype)])
    expected = _gradients([expected_out], twins.differentiable, [grad_out.to(dtype).double()])
    if dtype in HALF_DTYPES:
        # delta is taken of the rounded output, as in every fused backward pass.
        assert_same_but_for_rounding([out, *actual], [expected_out, *expected], dtype, 2.0)
    else:
        check_result(Result(out, actual), Result(expected_out, expected), dtype)


@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_logsumexp_is_differentiable(case: VarlenCase) -> None:
    tensors = case.tensors(torch.float64)
    twins = tensors.double()
    positional, options = tensors.arguments()
    out, logsumexp = torch_ext.varlen_attn(*positional, return_aux=_Aux, **options)
    expected_out, expected_logsumexp = varlen_reference(twins)
    weight = torch.randn(logsumexp.shape, dtype=torch.float64)

    def loss(out: Tensor, logsumexp: Tensor) -> Tensor:
        return (
            out.square().sum() + (logsumexp.masked_fill(logsumexp == -math.inf, 0) * weight).sum()
        )

    actual = torch.autograd.grad(loss(out, logsumexp), tensors.differentiable)
    expected = torch.autograd.grad(loss(expected_out, expected_logsumexp), twins.differentiable)
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    lengths = (3, 300, 1, 47, 128, 1, 700)
    case = VarlenCase(lengths, (5, 300, 900, 50, 128, 1, 700), window_size=(-1, 0), sink=True)
    tensors = case.tensors(dtype)
    positional, options = tensors.arguments()
    out, logsumexp = torch_ext.varlen_attn(*positional, return_aux=_Aux, **options)
    grad_out = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, tensors.differentiable[:3], grad_out)
    first_q = first_k = 0
    for q_len, k_len in zip(case.q_lens, case.k_lens, strict=True):
        rows = slice(first_q, first_q + q_len)
        columns = slice(first_k, first_k + k_len)
        first_q, first_k = rows.stop, columns.stop
        alone = [tensors.query[rows], tensors.key[columns], tensors.value[columns]]
        alone = [t.detach().requires_grad_() for t in alone]
        own_out, own_logsumexp = torch_ext.varlen_attn(
            *alone,
            cumulative([q_len]),
            cumulative([k_len]),
            q_len,
            k_len,
            return_aux=_Aux,
            **{**options, "sink": tensors.sink.detach()},
        )
        assert torch.equal(own_out, out[rows])
        assert torch.equal(own_logsumexp, logsumexp[:, rows])
        own_grads = torch.autograd.grad(own_out, alone, grad_out[rows])
        for own, whole, part in zip(own_grads, grads, (rows, columns, columns), strict=True):
            assert torch.equal(own, whole[part])


def test_thread_counts_give_the_same_bits() -> None:
    case = VarlenCase((3, 300, 1, 47, 128), (5, 300, 900, 50, 128), window_size=(-1, 0))
    tensors = case.tensors(torch.float32)
    positional, options = tensors.arguments()
    grad_out = torch.randn(sum(case.q_lens), case.heads, case.value_dim)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch_ext.varlen_attn(*positional, **options)
            results.append([out, *torch.autograd.grad(out, tensors.differentiable, grad_out)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_follows_the_seed_of_each_sequence() -> None:
    case = VarlenCase((20, 33), (25, 40), heads=2, kv_heads=2)
    tensors = case.tensors(torch.float64)
    seed = torch.tensor([77])
    positional, _ = tensors.arguments()
    out, _ = torch.ops.torch_ext.varlen_attention(
        *positional, 0.3, enable_gqa=True, dropout_seed=seed
    )
    grads = torch.autograd.grad(out.square().sum(), tensors.differentiable)
    step = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
    twins = tensors.double()
    outs = []
    for index in range(2):
        operands, _ = twins.sequence(index)
        own = seed + index * torch.tensor(step)
        part, _ = torch.ops.torch_ext.attention_forward(*operands, dropout_p=0.3, dropout_seed=own)
        outs.append(part.transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(outs), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(torch.cat(outs).square().sum(), twins.differentiable)
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_second_order() -> None:
    case = VarlenCase((3, 0, 4), (4, 2, 5), heads=2, kv_heads=1, head_dim=3, value_dim=2, sink=True)
    tensors = case.tensors(torch.float64)
    _, options = tensors.arguments()
    positional, _ = tensors.arguments()

    def call(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp = torch_ext.varlen_attn(
            query, key, value, *positional[3:], return_aux=_Aux, **{**options, "sink": sink}
        )
        return out, logsumexp

    assert torch.autograd.gradcheck(call, tensors.differentiable)
    assert torch.autograd.gradgradcheck(call, tensors.differentiable)


def test_lengths_from_one_to_ten_thousand() -> None:
    lengths = [1, 10_000, 3, 1, 500, 2]
    query, key, value = torch.randn(3, sum(lengths), 1, 16).unbind()
    cu_seq = cumulative(lengths, torch.int64)
    out = torch_ext.varlen_attn(
        query, key, value, cu_seq, cu_seq, 10_000, 10_000, window_size=(-1, 0)
    )
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        first += length
        expected = torch_ext.scaled_dot_product_attention(
            *(t[rows].transpose(0, 1) for t in (query, key, value)), is_causal=True
        )
        torch.testing.assert_close(out[rows].transpose(0, 1), expected, rtol=2e-5, atol=2e-6)


def test_no_sequence() -> None:
    nothing = torch.zeros(1, dtype=torch.int32)
    query = torch.randn(3, 2, 8, requires_grad=True)
    key, value = (torch.randn(0, 2, 8, requires_grad=True) for _ in range(2))
    out, logsumexp = torch_ext.varlen_attn(
        query, key, value, nothing, nothing, 0, 0, return_aux=_Aux
    )
    assert not out.any()
    assert bool((logsumexp == -math.inf).all())
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert [tuple(grad.shape) for grad in grads] == [(3, 2, 8), (0, 2, 8), (0, 2, 8)]
    assert not grads[0].any()
