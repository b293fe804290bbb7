"""The options of a score through the dispatcher: opcheck, compile, export, vmap, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_checks import call_tensors
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import torch_ext

OPS = torch.ops.torch_ext

EVERYTHING: dict[str, Any] = {
    "is_causal": True,
    "window_size": [3, 1],
    "softcap": 2.0,
    "causal_lower_right": True,
}
SLOPES = torch.tensor([0.5, 0.25])


def _sink() -> Tensor:
    return torch.randn(2, requires_grad=True)


def test_opcheck() -> None:
    tensors = call_tensors((2, 2, 5, 4), (2, 2, 7, 4))
    options = {**EVERYTHING, "alibi_slopes": SLOPES, "sink": _sink()}
    torch.library.opcheck(OPS.scaled_dot_product_attention.default, tuple(tensors), options)
    torch.library.opcheck(OPS.attention_forward.default, tuple(tensors), options)
    with torch.no_grad():
        out, logsumexp = OPS.attention_forward(*tensors, **options)
    grads = torch.randn_like(out).requires_grad_(), torch.randn_like(logsumexp).requires_grad_()
    is_causal = options.pop("is_causal")
    torch.library.opcheck(
        OPS.attention_backward.default,
        (*grads, *tensors, out, logsumexp, None, 0.0, is_causal),
        {**options, "output_mask": [True, True, True, False, True]},
    )


def test_opcheck_self_attention() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    weights = [torch.randn(s, requires_grad=True) for s in ((24, 8), (24,), (8, 8), (8,))]
    options = {**EVERYTHING, "alibi_slopes": SLOPES, "sink": _sink()}
    torch.library.opcheck(OPS.self_attention.default, (x, *weights, 2), options)
    is_causal = options.pop("is_causal")
    qkv = torch.randn(2, 5, 24, requires_grad=True)
    arguments = (2, None, 0.0, is_causal)
    torch.library.opcheck(OPS.packed_attention_forward.default, (qkv, *arguments), options)
    with torch.no_grad():
        out, logsumexp = OPS.packed_attention_forward(qkv, *arguments, **options)
    torch.library.opcheck(
        OPS.packed_attention_backward.default,
        (torch.randn_like(out), None, qkv, 2, out, logsumexp, *arguments[1:]),
        {**options, "output_mask": [True, False, True]},
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
    return torch_ext.scaled_dot_product_attention(
        query * 1.5, key, value, alibi_slopes=SLOPES, sink=sink, **EVERYTHING
    ).relu()


def test_compile_with_changing_lengths(fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(_attend, backend=counter, fullgraph=True, dynamic=True)
    sink = _sink()
    frames = []
    for q_len, kv_len in ((5, 7), (6, 11), (9, 40)):
        tensors = call_tensors((2, 2, q_len, 8), (2, 2, kv_len, 8))
        results = []
        for function in (compiled, _attend):
            out = function(*tensors, sink)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (*tensors, sink))])
        for actual, expected in zip(*results, strict=True):
            assert actual.stride() == expected.stride()
            assert_same_but_for_rounding(actual, expected)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3  # nothing is compiled anew


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return _attend(*tensors)

    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, {2: length}, {2: length}, None)
    tensors = (*(t.detach() for t in call_tensors((2, 2, 7, 8), (2, 2, 7, 8))), _sink().detach())
    program = torch.export.export(Layer(), tensors, dynamic_shapes={"tensors": shapes})
    others = (*(t.detach() for t in call_tensors((2, 2, 20, 8), (2, 2, 20, 8))), tensors[3])
    torch.testing.assert_close(program.module()(*others), _attend(*others))


@pytest.mark.parametrize("mapped", ["query", "sink", "slopes", "all"])
def test_vmap(mapped: str) -> None:
    count = 3
    query, key, value = (t.detach() for t in call_tensors((2, 2, 5, 8), (2, 2, 7, 8)))
    sink, slopes = torch.randn(2), SLOPES

    def repeat(tensor: Tensor, name: str) -> Tensor:
        return torch.randn(count, *tensor.shape).abs() if mapped in (name, "all") else tensor

    inputs = [repeat(query, "query"), key, value, repeat(slopes, "slopes"), repeat(sink, "sink")]
    dims = tuple(
        0 if tensor.dim() > plain.dim() else None
        for tensor, plain in zip(inputs, (query, key, value, slopes, sink), strict=True)
    )

    def loss(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, sink: Tensor) -> Tensor:
        out, logsumexp = torch_ext.attention_forward(
            query, key, value, alibi_slopes=slopes, sink=sink, **EVERYTHING
        )
        return out.sin().sum() + logsumexp.cos().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 4))
    actual = torch.vmap(gradient, in_dims=dims)(*inputs)
    for sample in range(count):
        arguments = [t if d is None else t[sample] for t, d in zip(inputs, dims, strict=True)]
        for mine, expected in zip(actual, gradient(*arguments), strict=True):
            assert_same_but_for_rounding(mine[sample], expected)


def test_vmap_refuses_different_dropout_with_mapped_sinks() -> None:
    query, key, value = (t.detach() for t in call_tensors((2, 5, 8), (2, 7, 8)))

    def call(sink: Tensor) -> Tensor:
        return torch_ext.scaled_dot_product_attention(query, key, value, dropout_p=0.5, sink=sink)

    with pytest.raises(NotImplementedError, match="sink takes a tensor that vmap does not map"):
        torch.vmap(call, randomness="different")(torch.randn(3, 2))


def test_autocast_keeps_sinks_and_slopes() -> None:
    tensors = call_tensors((2, 2, 5, 8), (2, 2, 7, 8))
    sink = _sink()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch_ext.scaled_dot_product_attention(
            *tensors, alibi_slopes=SLOPES, sink=sink, **EVERYTHING
        )
    expected = torch_ext.scaled_dot_product_attention(
        *(t.bfloat16() for t in tensors), alibi_slopes=SLOPES, sink=sink, **EVERYTHING
    )
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), sink)[0].dtype == torch.float32


def test_the_path_is_the_kernels() -> None:
    tensors = call_tensors((2, 2, 20, 8), (2, 2, 30, 8))
    torch_ext.scaled_dot_product_attention(
        *tensors, alibi_slopes=SLOPES, sink=_sink(), **EVERYTHING
    )
    assert torch_ext.last_attention_path().startswith("cpu.")


@pytest.mark.parametrize("window", [(3, 1), (-1, 2), (4, -1), (50, 50), (0, 0)], ids=str)
@pytest.mark.parametrize("offset", [0, 4, -30])
def test_flops_count_the_pairs_of_a_window(window: tuple[int, int], offset: int) -> None:
    tensors = call_tensors((2, 3, 9, 8), (2, 3, 13, 8))
    with FlopCounterMode(display=False) as counter:
        torch_ext.attention_forward(*tensors, window_size=window, causal_offset=offset)
    distance = torch.arange(13) - torch.arange(9)[:, None] - offset
    inside = torch.ones(9, 13, dtype=torch.bool)
    if window[0] >= 0:
        inside &= distance >= -window[0]
    if window[1] >= 0:
        inside &= distance <= window[1]
    assert counter.get_total_flops() == 2 * 3 * int(inside.sum()) * 2 * (8 + 8)


def test_causal_biases_take_the_options() -> None:
    from torch.nn.attention.bias import causal_lower_right

    query, key, value = (t.detach() for t in call_tensors((1, 2, 5, 8), (1, 2, 9, 8)))
    sink = torch.randn(2)
    ours = torch_ext.scaled_dot_product_attention(
        query, key, value, causal_lower_right(5, 9), sink=sink, window_size=(3, -1)
    )
    expected = torch_ext.scaled_dot_product_attention(
        query, key, value, None, 0.0, True, sink=sink, window_size=(3, -1), causal_lower_right=True
    )
    assert torch.equal(ours, expected)
