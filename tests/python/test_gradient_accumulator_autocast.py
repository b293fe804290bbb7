"""Autocast copies of the weights: made once a region, and never older than stock's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_models import assert_same_change, snapshot
from torch import Tensor, nn

from torch_ext import GradientAccumulator

_WIDTHS = (31, 17)


def _clamp(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.01, 0.01)


def _replace(weight: nn.Parameter) -> None:
    weight.data = torch.full_like(weight, 0.25)


def _write_one_through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[-1, -1] = 3.0


def _write_not_a_number(weight: nn.Parameter) -> None:
    weight.data[0, 0] = float("nan")


def _vector_to_parameters(weight: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(torch.arange(weight.numel()) * 1e-3, [weight])


def _write_with_a_version(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def _leave(weight: nn.Parameter) -> None:
    pass


_WRITES = [_clamp, _replace, _write_one_through_numpy, _write_not_a_number, _vector_to_parameters]


def _regions(dtype: torch.dtype, kind: str) -> tuple[Any, Any]:
    """Around both micro-batches, and around each."""
    region = torch.autocast("cpu", dtype=dtype, cache_enabled=kind != "without cache")
    if kind == "one region":
        return region, contextlib.nullcontext()
    return contextlib.nullcontext(), region


@pytest.mark.parametrize("kind", ["one each", "one region", "without cache"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [*_WRITES, _write_with_a_version, _leave])
def test_a_write_between_micro_batches_is_seen_where_stock_sees_it(
    write: Callable[[nn.Parameter], None], dtype: torch.dtype, kind: str
) -> None:
    if write is _write_with_a_version and kind == "one region":
        pytest.skip("stock's cache goes past the version counter, these copies do not")
    torch.manual_seed(0)
    stock = nn.Linear(*_WIDTHS)
    model = copy.deepcopy(stock)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    x = torch.randn(3, _WIDTHS[0])
    outputs: list[list[Tensor]] = [[], []]
    for layer, seen in zip((stock, model), outputs, strict=True):
        window, each = _regions(dtype, kind)
        with window:
            for micro_batch in range(3):
                scope = contextlib.nullcontext() if layer is stock else accumulator.micro_batch()
                with scope, each:
                    seen.append(layer(x))
                    seen[-1].float().sum().backward()
                if micro_batch == 0:
                    write(layer.weight)
    for ours, theirs in zip(*reversed(outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["one each", "one region", "without cache"])
def test_weights_are_cast_as_often_as_in_stock(kind: str) -> None:
    model = nn.Linear(*_WIDTHS, bias=False)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    x = torch.randn(3, _WIDTHS[0], requires_grad=True)
    copies: list[list[Tensor]] = [[], []]
    for ours, held in zip((False, True), copies, strict=True):

        def hold(tensor: Tensor, held: list[Tensor] = held) -> Tensor:
            if tuple(tensor.shape) == _WIDTHS:
                held.append(tensor)  # so that no other copy can have its memory
            return tensor

        window, each = _regions(torch.bfloat16, kind)
        with window:
            for _ in range(3):
                with (
                    accumulator.micro_batch() if ours else contextlib.nullcontext(),
                    each,
                    torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
                ):
                    (model(x) + model(x)).sum().backward()
    stock, found = ([tensor.data_ptr() for tensor in held] for held in copies)
    assert len(found) == len(stock) == 6
    assert len(set(found)) == len(set(stock)) == {"one each": 3, "one region": 1}.get(kind, 6)


def test_a_backward_has_the_copy_of_its_forward() -> None:
    """As in stock, whose graph holds it: a write in between changes the next forward alone."""
    torch.manual_seed(0)
    stock = nn.Linear(8, 8)
    model = copy.deepcopy(stock)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    grads = []
    for layer in (stock, model):
        x = torch.ones(2, 8, requires_grad=True)
        scope = contextlib.nullcontext() if layer is stock else accumulator.micro_batch()
        with scope:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                first = layer(x)
            layer.weight.data.mul_(2.0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                second = layer(x)
            first.sum().backward()
            grads.append(x.grad)
            x.grad = None
            second.sum().backward()
            grads.append(x.grad)
    torch.testing.assert_close(grads[2:], grads[:2], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = copy.deepcopy(stock)
    start = snapshot(stock)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for layers in (stock, model):
        for _ in range(2):
            x = torch.ones(2, 8, requires_grad=True)
            scope = contextlib.nullcontext() if layers is stock else accumulator.micro_batch(0.5)
            with scope:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=reentrant)
                out.float().sum().backward()
            layers[0].weight.data.clamp_(-0.1, 0.1)
    accumulator.step()
    torch.optim.SGD(stock.parameters(), lr=1.0).step()
    assert_same_change(model, stock, start, torch.bfloat16)


def test_a_freed_weight_is_refused() -> None:
    model = nn.Linear(8, 8)
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model.weight.untyped_storage().resize_(0)
    with (
        pytest.raises(RuntimeError, match="storage was freed"),
        accumulator.micro_batch(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(torch.ones(2, 8))
