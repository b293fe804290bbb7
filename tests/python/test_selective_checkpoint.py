"""Selective activation checkpointing: policies name torch_ext's operators, and are followed."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torch_ext

HEADS, EMBED = 2, 16
ATTENTION = torch.ops.torch_ext.attention_forward.default
LAYER = torch.ops.torch_ext.packed_attention_forward.default


class Calls(TorchDispatchMode):
    """How often each operator is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def must_save(operators, context, operator, *arguments, **options) -> CheckpointPolicy:
    if operator in operators:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def gradients(block, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    return list(torch.autograd.grad(block(x).square().sum(), [x, *parameters]))


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("whole_layer", [True, False])
def test_attention_is_saved_or_recomputed_as_named(whole_layer, dropout, saved, as_list):
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(EMBED, HEADS, dropout=dropout, batch_first=True)
    x = torch.randn(2, 9, EMBED, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        if whole_layer:
            return layer(x, x, x, need_weights=False)[0]
        heads = F.linear(x, layer.out_proj.weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)

    operator = LAYER if whole_layer else ATTENTION
    operators = [operator] if saved else [torch.ops.aten.mm.default]
    policy = operators if as_list else functools.partial(must_save, operators)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    parameters = list(layer.parameters()) if whole_layer else [layer.out_proj.weight]
    with torch_ext.enabled():
        expected = gradients(block, x, parameters)
        with Calls() as calls:
            found = gradients(checkpointed, x, parameters)
    assert calls.counts[operator] == (1 if saved else 2)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
