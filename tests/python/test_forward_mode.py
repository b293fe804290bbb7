"""Forward mode under the drop-in: such calls are torch's, so they give what stock gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

import torch_ext

Function = Callable[[Tensor], Tensor]

OTHER = torch.randn(2, 3, 6, 4, dtype=torch.float64)


def attend(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, OTHER, OTHER, **options)


def masked(x: Tensor) -> Tensor:
    # A mask that requires grad keeps stock off its flash kernel, which knows no forward mode.
    return attend(x, attn_mask=torch.zeros(6, 6, dtype=x.dtype, requires_grad=True))


def dropped(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return attend(x, dropout_p=0.2)


def layer(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, dropout=0.2, batch_first=True, dtype=x.dtype)
    merged = x.transpose(1, 2).flatten(2)
    return module(merged, merged, merged, need_weights=False)[0]


FUNCTIONS: dict[str, Function] = {
    "plain": attend,
    "mask": masked,
    "dropout": dropped,
    "value_dim": lambda x: F.scaled_dot_product_attention(x, x, x[..., :3]),
    "nn.MultiheadAttention": layer,
}


def dual(function: Function, x: Tensor) -> Tensor:
    with fwAD.dual_level():
        return fwAD.unpack_dual(function(fwAD.make_dual(x, torch.ones_like(x)))).tangent


MODES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "dual": dual,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function, randomness="same")(x),
    "hessian": lambda function, x: torch.func.jvp(
        torch.func.grad(lambda t: function(t).square().sum()), (x,), (torch.ones_like(x),)
    )[1],
}


def outcome(mode: Callable[..., Tensor], function: Function, x: Tensor) -> Tensor | type:
    try:
        return mode(function, x).detach()
    except (NotImplementedError, RuntimeError) as error:
        return type(error)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_as_stock(function: Function, mode: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    stock = outcome(mode, function, x)
    with torch_ext.enabled():
        ours = outcome(mode, function, x)
    if isinstance(stock, type):
        assert ours is stock
    else:
        assert torch.equal(ours, stock)


def test_the_reason_is_named() -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    with torch_ext.enabled():
        dual(dropped, x)
    assert torch_ext.last_attention_path() == "torch: forward-mode automatic differentiation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_out_has_any_floating_type(dtype: torch.dtype) -> None:
    """Compilers hand it over in the type that they computed it in."""
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.bfloat16) for n in (5, 7, 7))
    out, logsumexp = torch.ops.torch_ext.attention_forward(query, key, value)
    grad_out = torch.randn(out.shape, dtype=torch.bfloat16)
    grads, expected = (
        torch.ops.torch_ext.attention_backward(g, None, query, key, value, out, logsumexp)[:3]
        for g in (grad_out.to(dtype), grad_out)
    )
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_a_packed_out_has_any_floating_type(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    out, logsumexp = torch.ops.torch_ext.packed_attention_forward(qkv, 2)
    grad_out = torch.randn(out.shape, dtype=torch.bfloat16)
    grad, expected = (
        torch.ops.torch_ext.packed_attention_backward(g, None, qkv, 2, out, logsumexp)[0]
        for g in (grad_out.to(dtype), grad_out)
    )
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, expected)
