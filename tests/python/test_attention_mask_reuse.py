"""Masks that are no variables: made under inference mode, or refilled in place before backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_ext

B, H, L, E = 2, 4, 40, 8

Attend = Callable[[Tensor, Tensor], Tensor]


def through_function(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(-1, (H, E)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, mask)


def with_dropout(x: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(1)
    heads = x.unflatten(-1, (H, E)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, mask, dropout_p=0.2)


def as_padding(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(-1, (H, E)).transpose(1, 2)
    return torch_ext.attention_forward(heads, heads, heads, key_padding_mask=mask[0])[0]


def packed(x: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(H * E, H, batch_first=True)
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


def packed_padding(x: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(H * E, H, batch_first=True)
    return module(x, x, x, key_padding_mask=mask[:B], need_weights=False)[0]


def checkpointed(x: Tensor, mask: Tensor) -> Tensor:
    return checkpoint(through_function, x, mask.clone(), use_reentrant=False)


WAYS: dict[str, Attend] = {
    "function": through_function,
    "dropout": with_dropout,
    "padding": as_padding,
    "packed": packed,
    "packed padding": packed_padding,
    "checkpointed": checkpointed,
}


def fill(mask: Tensor, step: int) -> None:
    """A boolean mask hides keys, whichever way it is read; an additive one weighs them."""
    with torch.no_grad():
        mask.zero_()
        mask[:, step : step + 20] = 1


def gradient(attend: Attend, masks: list[Tensor], x: Tensor) -> Tensor:
    """Of two calls; with one mask for both, refilled in between."""
    losses = []
    for step in range(2):
        mask = masks[step % len(masks)]
        fill(mask, step)
        losses.append(attend(x, mask).square().sum())
    (grad,) = torch.autograd.grad(losses[0] + losses[1], x)
    return grad


@pytest.mark.parametrize("attend", WAYS.values(), ids=WAYS)
def test_boolean_mask_is_refilled_before_backward(attend: Attend) -> None:
    x = torch.randn(B, L, H * E, requires_grad=True)
    with torch_ext.enabled():
        apart = gradient(attend, [torch.zeros(L, L, dtype=torch.bool) for _ in range(2)], x)
        one = gradient(attend, [torch.zeros(L, L, dtype=torch.bool)], x)
    assert torch.equal(one, apart)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_mask_with_dropout_is_refilled_before_backward(dtype: torch.dtype) -> None:
    """Where stock writes weights out it keeps no additive mask either."""
    x = torch.randn(B, L, H * E, requires_grad=True)
    with torch_ext.enabled():
        apart = gradient(with_dropout, [torch.zeros(L, L, dtype=dtype) for _ in range(2)], x)
        one = gradient(with_dropout, [torch.zeros(L, L, dtype=dtype)], x)
    assert torch.equal(one, apart)


@pytest.mark.parametrize("attend", WAYS.values(), ids=WAYS)
def test_mask_of_inference_mode(attend: Attend) -> None:
    x = torch.randn(B, L, H * E, requires_grad=True)
    with torch.inference_mode():
        mask = torch.rand(L, L) < 0.5
    with torch_ext.enabled():
        (grad,) = torch.autograd.grad(attend(x, mask).square().sum(), x)
        (expected,) = torch.autograd.grad(attend(x, mask.clone()).square().sum(), x)
    assert torch.equal(grad, expected)


def test_mask_of_inference_mode_compiled() -> None:
    x = torch.randn(B, L, H * E, requires_grad=True)
    with torch.inference_mode():
        mask = torch.rand(L, L) < 0.5
    with torch_ext.enabled():
        compiled = torch.compile(through_function, backend="aot_eager")
        (grad,) = torch.autograd.grad(compiled(x, mask.clone()).square().sum(), x)
        (expected,) = torch.autograd.grad(through_function(x, mask).square().sum(), x)
    assert torch.equal(grad, expected)


def test_additive_masks_keep_the_rules_of_variables() -> None:
    """As with stock's flash kernel: written in place before backward they raise."""
    x = torch.randn(B, L, H * E, requires_grad=True)
    for requires_grad in (False, True):
        mask = torch.zeros(L, L, requires_grad=requires_grad)
        with torch_ext.enabled(), pytest.raises(RuntimeError, match="modified by an inplace"):
            gradient(through_function, [mask], x)


def test_an_expanded_mask_is_kept_once() -> None:
    """The copy has one entry where every index reads the same memory."""
    length = 512
    query = torch.randn(4, 8, length, 16, requires_grad=True)
    mask = torch.ones(4, 1, 1, length, dtype=torch.bool).expand(4, 8, length, length)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch_ext.scaled_dot_product_attention(query, query, query, mask)
    (of_mask,) = (tensor for tensor in kept if tensor.dtype == torch.bool)
    assert of_mask.shape == (4, 1, 1, length)
    assert of_mask.untyped_storage().nbytes() == 4 * length
