"""torch.func and vmap over the operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_reference import attention
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

OPS = torch.ops.torch_ext


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return OPS.scaled_dot_product_attention(*args, **kwargs)


def _loop(function: Callable[..., Tensor], in_dims: tuple, inputs: list, count: int) -> Tensor:
    return torch.stack(
        [
            function(
                *(t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True))
            )
            for i in range(count)
        ]
    )


def _mapped(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype) -> Tensor:
    sizes = list(shape)
    if dim is not None:
        sizes.insert(dim if dim >= 0 else len(sizes) + 1 + dim, 3)
    return torch.randn(sizes, dtype=dtype)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "in_dims",
    [d for d in itertools.product((None, 0), repeat=4) if any(x == 0 for x in d)],
    ids=str,
)
def test_vmap_every_combination(in_dims: tuple[int | None, ...], rank: int) -> None:
    lead = (2, 2, 4)[5 - rank :]
    shapes = [(*lead, 5, 8), (*lead, 7, 8), (*lead, 7, 6), (5, 7)]
    inputs = [_mapped(s, d, torch.float32) for s, d in zip(shapes, in_dims, strict=True)]
    out = vmap(sdpa, in_dims=in_dims)(*inputs)
    assert_same_but_for_rounding(out, _loop(sdpa, in_dims, inputs, 3))


@pytest.mark.parametrize("in_dims", [(1, 0, 2, None), (-1, None, 1, 0), (2, 3, -1, 1)], ids=str)
@pytest.mark.parametrize("mask_shape", [(5, 7), (4, 1, 7), (2, 1, 1, 7), (7,), (1,)], ids=str)
def test_vmap_other_dims(mask_shape: tuple[int, ...], in_dims: tuple[int | None, ...]) -> None:
    shapes = [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), mask_shape]
    if in_dims[3] is not None and in_dims[3] > len(mask_shape):
        in_dims = (*in_dims[:3], 0)
    inputs = [_mapped(s, d, torch.float32) for s, d in zip(shapes, in_dims, strict=True)]
    out = vmap(sdpa, in_dims=in_dims)(*inputs)
    assert_same_but_for_rounding(out, _loop(sdpa, in_dims, inputs, 3))


@pytest.mark.parametrize("mask_dim", [None, 0])
def test_vmap_boolean_mask(mask_dim: int | None) -> None:
    query, key, value = (torch.randn(3, 2, 4, n, 8) for n in (5, 7, 7))
    mask = _mapped((2, 1, 5, 7), mask_dim, torch.float32) > -0.5
    in_dims = (0, 0, 0, mask_dim)
    out = vmap(sdpa, in_dims=in_dims)(query, key, value, mask)
    expected = _loop(sdpa, in_dims, [query, key, value, mask], 3)
    assert_same_but_for_rounding(out, expected)


def test_vmap_options() -> None:
    query, key, value = (
        torch.randn(3, 2, 4, 6, 8),
        torch.randn(3, 2, 2, 6, 8),
        torch.randn(2, 2, 6, 8),
    )

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)

    out = vmap(function, in_dims=(0, 0, None))(query, key, value)
    expected = _loop(function, (0, 0, None), [query, key, value], 3)
    assert_same_but_for_rounding(out, expected)


def test_vmap_forward_with_logsumexp_and_padding() -> None:
    query, key, value = (torch.randn(3, 2, 4, n, 8) for n in (5, 7, 7))
    padding = torch.rand(3, 2, 7) < 0.4

    def function(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        out, logsumexp = OPS.attention_forward(query, key, value, key_padding_mask=padding)
        return torch.cat([out, logsumexp[..., None]], -1)

    for in_dims in ((0, 0, 0, 0), (0, None, None, 0), (None, None, None, 0)):
        inputs = [
            t if d == 0 else t[0]
            for t, d in zip((query, key, value, padding), in_dims, strict=True)
        ]
        out = vmap(function, in_dims=in_dims)(*inputs)
        assert_same_but_for_rounding(out, _loop(function, in_dims, inputs, 3))


def test_vmap_out_dims_and_chunks() -> None:
    query = torch.randn(4, 2, 5, 8)
    out = vmap(lambda q: sdpa(q, q, q), out_dims=2)(query)
    expected = torch.stack([sdpa(q, q, q) for q in query], 2)
    assert_same_but_for_rounding(out, expected)
    chunked = vmap(lambda q: sdpa(q, q, q), chunk_size=3)(query)
    assert_same_but_for_rounding(chunked, expected.movedim(2, 0))


def test_nested_vmap() -> None:
    query, key = torch.randn(2, 3, 4, 5, 8), torch.randn(3, 4, 7, 8)
    out = vmap(vmap(lambda q, k: sdpa(q, k, k)), in_dims=(0, None))(query, key)
    expected = torch.stack(
        [torch.stack([sdpa(q, k, k) for q, k in zip(qs, key, strict=True)]) for qs in query]
    )
    assert_same_but_for_rounding(out, expected)


def test_vmap_self_attention() -> None:
    arguments = [torch.randn(s) for s in ((2, 5, 12), (36, 12), (36,), (12, 12), (12,))]
    stacked = [torch.stack([t, 2 * t, -t]) for t in arguments]

    def function(*tensors: Tensor) -> Tensor:
        return OPS.self_attention(*tensors, 3, is_causal=True)

    for in_dims in ((0, None, None, None, None), (0, 0, 0, 0, 0), (None, 0, 0, None, 0)):
        inputs = [s if d == 0 else t for s, t, d in zip(stacked, arguments, in_dims, strict=True)]
        out = vmap(function, in_dims=in_dims)(*inputs)
        expected = _loop(function, in_dims, inputs, 3)
        assert_same_but_for_rounding(out, expected)


def test_vmap_dropout_randomness() -> None:
    """vmap's own rules: refused by default, one mask or one each as asked for."""
    query = torch.randn(1, 5, 40, 8).expand(3, 5, 40, 8).contiguous()

    def function(query: Tensor) -> Tensor:
        return sdpa(query, query, query, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(query)
    same = vmap(function, randomness="same")(query)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same[0], sdpa(query[0], query[0], query[0]))
    different = vmap(function, randomness="different")(query)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])


def test_grad() -> None:
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    mask = torch.randn(5, 7, dtype=torch.float64)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs).sin().sum()

    argnums = (0, 1, 2, 3)
    actual = grad(loss(sdpa), argnums)(query, key, value, mask)
    expected = grad(loss(lambda *i: attention(*i)[0]), argnums)(query, key, value, mask)
    for mine, exact in zip(actual, expected, strict=True):
        assert_same_but_for_rounding(mine, exact)


def test_grad_of_grad() -> None:
    query, key = torch.randn(5, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)

    def twice(function: Callable[..., Tensor]) -> Tensor:
        first = grad(lambda q: function(q, key, key).sin().sum())
        return grad(lambda q: first(q).cos().sum())(query)

    assert_same_but_for_rounding(twice(sdpa), twice(lambda *i: attention(*i)[0]))


def test_per_sample_gradients() -> None:
    """vmap(grad): each sample's own gradient, of a shared tensor too."""
    query, mask = torch.randn(4, 3, 6, 8), torch.randn(6, 6)

    def loss(query: Tensor, mask: Tensor) -> Tensor:
        return sdpa(query, query, query, mask).sin().sum()

    actual = vmap(grad(loss, (0, 1)), in_dims=(0, None))(query, mask)
    for index in range(4):
        expected = grad(loss, (0, 1))(query[index], mask)
        for mine, exact in zip(actual, expected, strict=True):
            assert_same_but_for_rounding(mine[index], exact)


def test_gradient_through_vmap() -> None:
    query = torch.randn(4, 3, 6, 8, requires_grad=True)
    key = torch.randn(3, 6, 8, requires_grad=True)
    mapped = vmap(lambda q, k: sdpa(q, k, k), in_dims=(0, None))(query, key)
    plain = sdpa(query, key, key)
    for mine, exact in zip(
        torch.autograd.grad(mapped.sin().sum(), (query, key)),
        torch.autograd.grad(plain.sin().sum(), (query, key)),
        strict=True,
    ):
        assert_same_but_for_rounding(mine, exact)


def test_jacrev() -> None:
    query, key = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 5, 4, dtype=torch.float64),
    )
    actual = jacrev(sdpa, (0, 1, 2))(query, key, key)
    expected = jacrev(lambda *i: attention(*i)[0], (0, 1, 2))(query, key, key)
    for mine, exact in zip(actual, expected, strict=True):
        assert_same_but_for_rounding(mine, exact)


def test_jacrev_of_jacrev() -> None:
    query, key = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def hessian(function: Callable[..., Tensor]) -> Tensor:
        return jacrev(jacrev(lambda q: function(q, key, key).sin().sum()))(query)

    assert_same_but_for_rounding(hessian(sdpa), hessian(lambda *i: attention(*i)[0]))


def test_vjp() -> None:
    query, key = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    out, pullback = vjp(lambda q: sdpa(q, key, key), query)
    leaf = query.clone().requires_grad_()
    expected = torch.autograd.grad(sdpa(leaf, key, key), leaf, torch.ones_like(out))
    assert torch.equal(pullback(torch.ones_like(out))[0], expected[0])


def test_forward_mode_raises() -> None:
    query, key = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    for function in (
        lambda: jvp(lambda q: sdpa(q, key, key), (query,), (torch.ones_like(query),)),
        lambda: torch.func.jacfwd(lambda q: sdpa(q, key, key))(query),
        lambda: torch.func.hessian(lambda q: sdpa(q, key, key).sum())(query),
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward.mode"):
            function()


def test_functional_call_of_module() -> None:
    """Per-sample gradients of a layer's parameters, the usual reason for torch.func."""
    layer = torch.nn.Linear(8, 24)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        query, key, value = torch.func.functional_call(layer, parameters, sample).chunk(3, -1)
        return sdpa(query, key, value, is_causal=True).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    samples = torch.randn(4, 6, 8)
    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
    for index in range(4):
        expected = grad(loss)(parameters, samples[index])
        for name in parameters:
            assert_same_but_for_rounding(actual[name][index], expected[name])
