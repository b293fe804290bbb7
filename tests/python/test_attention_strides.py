"""Strides of out and of the gradients are stock's, so that its views and in-place writes work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_ext

B, H, L, S, E = 2, 4, 6, 7, 8
SIZES = {"query": (B, H, L, E), "key": (B, H, S, E), "value": (B, H, S, E)}


def stock_follows_query() -> bool:
    """Whether this torch has the rule: older ones leave (batch, length, heads, dim) in memory."""
    contiguous = torch.zeros(SIZES["query"])
    return (
        F.scaled_dot_product_attention(contiguous, contiguous, contiguous).is_contiguous()
        and torch._fused_sdp_choice(contiguous[0], contiguous[0], contiguous[0]) != 0
    )


pytestmark = pytest.mark.skipif(
    not stock_follows_query(), reason="torch_ext has the strides of torch 2.15"
)

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda b, h, n, e: torch.randn(b, h, n, e),
    "transposed heads": lambda b, h, n, e: torch.randn(b, n, h, e).transpose(1, 2),
    "packed": lambda b, h, n, e: torch.randn(b, n, h, 3 * e)[..., :e].transpose(1, 2),
    "sequence first": lambda b, h, n, e: torch.randn(n, b, h, e).permute(1, 2, 0, 3),
    "reversed": lambda b, h, n, e: torch.randn(n, h, b, e).permute(2, 1, 0, 3),
    "heads first": lambda b, h, n, e: torch.randn(h, b, n, e).transpose(0, 1),
    "expanded batch": lambda b, h, n, e: torch.randn(1, h, n, e).expand(b, h, n, e),
    "expanded heads": lambda b, h, n, e: torch.randn(b, 1, n, e).expand(b, h, n, e),
    "every other row": lambda b, h, n, e: torch.randn(b, h, 2 * n, e)[:, :, ::2],
    "every other column": lambda b, h, n, e: torch.randn(b, h, n, 2 * e)[..., ::2],
    "columns first": lambda b, h, n, e: torch.randn(b, h, e, n).transpose(2, 3),
}

MASKS: dict[str, Callable[[], Tensor]] = {
    "boolean": lambda: torch.ones(L, S, dtype=torch.bool),
    "padding": lambda: torch.ones(B, 1, 1, S, dtype=torch.bool),
    "additive": lambda: torch.randn(B, H, L, S),
    "variable": lambda: torch.randn(L, S, requires_grad=True),
    "of heads": lambda: torch.randn(H, L, S),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.1},
}


def strides(
    inputs: tuple[Tensor, ...], mask: Tensor | None = None, **options: Any
) -> dict[str, tuple[int, ...]]:
    out = F.scaled_dot_product_attention(*inputs, mask, **options)
    found = {"out": out.stride()}
    if out.requires_grad:
        named = {**dict(zip(SIZES, inputs, strict=True)), "mask": mask}
        wanted = {n: t for n, t in named.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(out, list(wanted.values()), torch.randn(out.shape).to(out))
        for name, grad in zip(wanted, grads, strict=True):
            found[f"gradient of {name}"] = grad.stride()
    return found


def assert_strides_of_stock(
    inputs: tuple[Tensor, ...], mask: Tensor | None = None, **options: Any
) -> None:
    for requires_grad in (False, True):
        tensors = tuple(t.detach().requires_grad_(requires_grad) for t in inputs)
        stock = strides(tensors, mask, **options)
        with torch_ext.enabled():
            ours = strides(tensors, mask, **options)
            assert torch_ext.last_attention_path().startswith("cpu.")
        assert ours == stock


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Callable[..., Tensor], options: dict[str, Any]) -> None:
    inputs = tuple(layout(*sizes) for sizes in SIZES.values())
    assert_strides_of_stock(inputs, **options)
    assert_strides_of_stock(tuple(t[0] for t in inputs), **options)
    assert_strides_of_stock((inputs[0], inputs[1], layout(B, H, S, E - 3)), **options)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed heads"])
def test_masks(layout: str, mask: Callable[[], Tensor]) -> None:
    inputs = tuple(LAYOUTS[layout](*sizes) for sizes in SIZES.values())
    assert_strides_of_stock(inputs, mask())
    assert_strides_of_stock(inputs, mask(), dropout_p=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed heads"])
def test_dtypes(layout: str, dtype: torch.dtype) -> None:
    inputs = tuple(LAYOUTS[layout](*sizes).to(dtype) for sizes in SIZES.values())
    for options in OPTIONS.values():
        assert_strides_of_stock(inputs, **options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed heads"])
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "enable_gqa"),
    [(2, 2, True), (1, 1, True), (4, 4, True), (1, 1, False), (4, 1, False)],
)
def test_heads(layout: str, key_heads: int, value_heads: int, enable_gqa: bool) -> None:
    make = LAYOUTS[layout]
    inputs = (make(B, H, L, E), make(B, key_heads, S, E), make(B, value_heads, S, E))
    for options in OPTIONS.values():
        assert_strides_of_stock(inputs, enable_gqa=enable_gqa, **options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed heads"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 1, 7, 8), (2, 1, 6, 7, 8), (1, 4, 6, 7, 8), (2, 4, 6, 1, 8), (2, 4, 6, 7, 1)],
    ids=str,
)
def test_dimensions_of_one(layout: str, sizes: tuple[int, ...]) -> None:
    b, h, q_len, kv_len, e = sizes
    make = LAYOUTS[layout]
    inputs = (make(b, h, q_len, e), make(b, h, kv_len, e), make(b, h, kv_len, e))
    for options in OPTIONS.values():
        assert_strides_of_stock(inputs, **options)


@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 0, 7, 8), (2, 4, 6, 0, 8), (0, 4, 6, 7, 8), (2, 0, 6, 7, 8), (2, 4, 6, 7, 0)],
    ids=str,
)
def test_dimensions_of_zero(sizes: tuple[int, ...]) -> None:
    """Of out alone: stock's gradients are zeros of strides 0."""
    b, h, q_len, kv_len, e = sizes
    make = LAYOUTS["transposed heads"]
    inputs = (make(b, h, q_len, e), make(b, h, kv_len, e), make(b, h, kv_len, e))
    stock = strides(inputs)
    with torch_ext.enabled():
        assert strides(inputs) == stock


@pytest.mark.parametrize(
    "inputs",
    {
        "2-D": ((L, E), (S, E), (S, E)),
        "5-D": ((2, 3, H, L, E), (2, 3, H, S, E), (2, 3, H, S, E)),
        "shared batch": ((B, H, L, E), (1, H, S, E), (1, H, S, E)),
        "shared query": ((1, H, L, E), (B, H, S, E), (B, H, S, E)),
    }.values(),
    ids=str,
)
def test_ranks_and_broadcasting(inputs: tuple[tuple[int, ...], ...]) -> None:
    for options in OPTIONS.values():
        assert_strides_of_stock(tuple(torch.randn(sizes) for sizes in inputs), **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed heads", "packed"])
def test_compiled_strides_are_those_of_eager(layout: str, options: dict[str, Any]) -> None:
    inputs = tuple(LAYOUTS[layout](*sizes).requires_grad_() for sizes in SIZES.values())
    with torch_ext.enabled():
        eager = strides(inputs, **options)
        compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager")
        out = compiled(*inputs, **options)
        grads = torch.autograd.grad(out, inputs, torch.randn(out.shape))
    assert [out.stride(), *(grad.stride() for grad in grads)] == list(eager.values())


def viewed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value, mask)
    out.view(-1)
    return out.view(B * H, L, -1).mul_(2)


@pytest.mark.parametrize("value_dim", [E, E - 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_views(backend: str, dtype: torch.dtype, masked: bool, value_dim: int) -> None:
    query, key, value = (
        torch.randn(*sizes[:3], dim, dtype=dtype)
        for sizes, dim in zip(SIZES.values(), (E, E, value_dim), strict=True)
    )
    mask = torch.rand(L, S) > 0.2 if masked else None
    with torch_ext.enabled():
        torch.compiler.reset()
        function = torch.compile(viewed, backend=backend) if backend != "eager" else viewed
        expected = F.scaled_dot_product_attention(query, key, value, mask).flatten(0, 1) * 2
        assert torch.equal(function(query, key, value, mask), expected)


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.1}, {"value_dim": E - 3}, {"mask": "variable"}], ids=str
)
def test_out_is_written_in_place_while_it_trains(options: dict[str, Any]) -> None:
    """Where stock's written-out products allow it, with the gradients of an out-of-place write."""
    value_dim = options.get("value_dim", E)
    mask = MASKS[options["mask"]]() if "mask" in options else None
    query, key, value = (
        torch.randn(*sizes[:3], dim, requires_grad=True)
        for sizes, dim in zip(SIZES.values(), (E, E, value_dim), strict=True)
    )
    grads = []
    for multiply in (Tensor.mul, Tensor.mul_):
        torch.manual_seed(0)
        with torch_ext.enabled():
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p=options.get("dropout_p", 0.0)
            )
        multiply(out, 2).square().sum().backward()
        grads.append([t.grad for t in (query, key, value)])
        query.grad = key.grad = value.grad = None
    for apart, in_place in zip(*grads, strict=True):
        assert torch.equal(apart, in_place)
