"""sink: one more score of each row without a value, and its gradient."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DTYPES
from option_checks import call_tensors, check_options, check_second_order

import torch_ext


def sinks(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(heads, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 9), (2, 1500), (70, 130)])
def test_sink(q_len: int, kv_len: int, dtype: torch.dtype) -> None:
    tensors = call_tensors((2, 4, q_len, 24), (2, 2, kv_len, 24), dtype)
    check_options(*tensors, sink=sinks(4, dtype), enable_gqa=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sinks_dtype_is_its_own(dtype: torch.dtype) -> None:
    tensors = call_tensors((1, 2, 20, 8), (1, 2, 30, 8))
    sink = sinks(2, dtype)
    out = torch_ext.scaled_dot_product_attention(*tensors, sink=sink)
    (grad,) = torch.autograd.grad(out.sum(), sink)
    assert (out.dtype, grad.dtype, grad.shape) == (torch.float32, dtype, (2,))


def test_batches_and_no_heads() -> None:
    check_options(*call_tensors((2, 3, 2, 20, 8), (2, 3, 2, 30, 8)), sink=sinks(2))
    check_options(*call_tensors((20, 8), (30, 8)), sink=sinks(1))
    check_options(*call_tensors((3, 20, 8), (3, 30, 8)), sink=sinks(3))


def test_extreme_sinks() -> None:
    query, key, value = call_tensors((1, 3, 20, 8), (1, 3, 30, 8))
    sink = torch.tensor([-torch.inf, 100.0, -100.0], requires_grad=True)
    out, logsumexp = torch_ext.attention_forward(query, key, value, sink=sink)
    plain, plain_logsumexp = torch_ext.attention_forward(query, key, value)
    torch.testing.assert_close(out[:, [0, 2]], plain[:, [0, 2]])
    torch.testing.assert_close(logsumexp[:, [0, 2]], plain_logsumexp[:, [0, 2]])
    torch.testing.assert_close(logsumexp[:, 1], torch.full((1, 20), 100.0))
    grads = torch.autograd.grad(out.sum(), (query, key, value, sink))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kv_len", [0, 6])
def test_rows_without_keys(kv_len: int) -> None:
    query, key, value = call_tensors((2, 3, 4, 8), (2, 3, kv_len, 8))
    sink = sinks(3)
    padding = torch.ones(2, kv_len, dtype=torch.bool)
    out, logsumexp = torch_ext.attention_forward(
        query, key, value, sink=sink, key_padding_mask=padding
    )
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(logsumexp, sink[:, None].expand(2, 3, 4))
    for grad in torch.autograd.grad(out.sum(), (query, key, value, sink), retain_graph=True):
        assert torch.equal(grad, torch.zeros_like(grad))
    (grad,) = torch.autograd.grad(logsumexp.sum(), sink)
    torch.testing.assert_close(grad, torch.full((3,), 8.0))


def test_twice() -> None:
    tensors = call_tensors((2, 4, 5, 4), (2, 2, 7, 4), torch.float64)
    mask = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    check_second_order(*tensors, mask, sinks(4, torch.float64), enable_gqa=True)
    check_second_order(*tensors[:3], None, sinks(4, torch.float64), enable_gqa=True, softcap=1.5)


def test_self_attention() -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(s, dtype=torch.float64) / 4 for s in ((48, 16), (48,), (16, 16), (16,))]
    sink = sinks(2, torch.float64)

    def call(x: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        return torch_ext.self_attention(x, *weights, 2, is_causal=True, sink=sink)

    assert torch.autograd.gradcheck(call, (x, sink))
    assert torch.autograd.gradgradcheck(call, (x, sink))


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "sink takes Float, Double, BFloat16 or Half, got Long"),
        (torch.rand(3), r"sink takes one number for each head of query, \(4\), got \[3\]"),
        (torch.rand(1, 4), r"sink takes one number for each head of query, \(4\)"),
        (torch.rand(4).to_sparse(), "sink takes a dense tensor"),
        (torch.rand(4, device="meta"), "sink takes the device of query"),
    ],
)
def test_refusals(sink: torch.Tensor, message: str) -> None:
    tensors = call_tensors((2, 4, 4, 4), (2, 4, 4, 4))
    with pytest.raises(RuntimeError, match=message):
        torch_ext.scaled_dot_product_attention(*tensors, sink=sink)


def test_no_gradient_of_a_sink_that_is_not_there() -> None:
    tensors = [t.detach() for t in call_tensors((1, 2, 4, 4), (1, 2, 4, 4))]
    out, logsumexp = torch_ext.attention_forward(*tensors)
    with pytest.raises(RuntimeError, match="output_mask takes True for sink only where there is"):
        torch.ops.torch_ext.attention_backward(
            out, None, *tensors, out, logsumexp, output_mask=[True, True, True, False, True]
        )
