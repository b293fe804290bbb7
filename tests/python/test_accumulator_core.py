"""The class beneath GradientAccumulator, called with what its own front never gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import GradientAccumulator

_FLOAT32 = 6  # c10::ScalarType


def _core(count: int = 2) -> Any:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(count)]
    names = [f"p{k}" for k in range(count)]
    core = torch.classes.torch_ext.AccumulatorCore(params, names, _FLOAT32, True)
    core.add([0], [torch.ones(3, 4)], 1.0, None)
    return core


@pytest.mark.parametrize("index", [-1, 2, 2**62, -(2**63)])
@pytest.mark.parametrize(
    "call",
    [
        lambda core, index: core.sums([index]),
        lambda core, index: core.masters([index]),
        lambda core, index: core.lend_masters([index]),
        lambda core, index: core.zero_missing([index]),
        lambda core, index: core.forget([index]),
        lambda core, index: core.scale_sums([index], torch.ones(())),
        lambda core, index: core.add([index], [torch.ones(3, 4)], 1.0, None),
        lambda core, index: core.add_to_open([index], [torch.ones(3, 4)]),
        lambda core, index: core.linear(torch.ones(2, 4), torch.ones(3, 4), None, index, -1),
        lambda core, index: core.embedding(
            torch.ones(2).long(), torch.ones(3, 4), -1, False, index
        ),
    ],
)
def test_indices_out_of_range(call: Callable[[Any, int], Any], index: int) -> None:
    core = _core()
    with pytest.raises(RuntimeError, match=f"takes a number from 0 to 1, got {index}"):
        call(core, index)
    assert core.micro_batches() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda core: core.sums([1]), "takes a parameter that has a sum, got 1, p1"),
        (lambda core: core.add([0, 1], [torch.ones(3, 4)], 1.0, None), "one tensor for each index"),
        (
            lambda core: core.add([0], [torch.ones(3, 4)] * 2, 1.0, None),
            "one tensor for each index",
        ),
        (lambda core: core.add([1, 1], [torch.ones(3, 4)] * 2, 1.0, None), "each index once"),
        (lambda core: core.add([1], [torch.ones(4, 3)], 1.0, None), "takes the sizes"),
        (lambda core: core.add([1], [torch.ones(3, 4).long()], 1.0, None), "takes a floating"),
        (lambda core: core.merge(core), "takes another window"),
        (lambda core: core.merge(_core(3)), "takes a window of the same parameters"),
        (lambda core: core.merge(_core(2)), "takes a window of the same parameters"),
        (
            lambda core: core.linear(torch.ones(2, 4), torch.ones(3, 4), None, 0, -1),
            "weight_index takes the place of weight",
        ),
    ],
)
def test_other_arguments(call: Callable[[Any], Any], message: str) -> None:
    core = _core()
    with pytest.raises(RuntimeError, match=message):
        call(core)
    assert core.micro_batches() == 1


def _free(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_gradient_whose_memory_was_freed(earlier: int) -> None:
    model = nn.Linear(4, 3)
    accumulator = GradientAccumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), add_in_backward=False
    )
    for _ in range(earlier):
        with accumulator.micro_batch():
            model(torch.ones(2, 4)).sum().backward()
    micro_batch = accumulator.micro_batch()
    micro_batch.__enter__()
    model(torch.ones(2, 4)).sum().backward()
    assert model.weight.grad is not None
    _free(model.weight.grad)
    with pytest.raises(RuntimeError, match=r"gradient of weight .* storage was freed"):
        micro_batch.__exit__(None, None, None)
    assert accumulator.micro_batches == earlier
