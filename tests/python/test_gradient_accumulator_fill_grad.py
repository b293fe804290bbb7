"""The normalised gradient in .grad before the step, to look at and to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_models import (
    accumulate,
    assert_same_but_for_rounding,
    assert_same_parameters,
    loss_sum,
    one_large_batch,
    token_batches,
    twins,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 2))


def _nothing(params: list[Tensor]) -> None:
    pass


def _halve(params: list[Tensor]) -> None:
    for param in params:
        param.grad *= 0.5


def _replace(params: list[Tensor]) -> None:
    for param in params:
        param.grad = param.grad.sign()


def _drop(params: list[Tensor]) -> None:
    params[0].grad = None


def _clip(params: list[Tensor]) -> None:
    clip_grad_norm_(params, 0.01)


@pytest.mark.parametrize("edit", [_nothing, _halve, _replace, _drop, _clip])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: torch.optim.RMSprop(p, lr=1e-2)]
)
def test_the_step_takes_what_grad_holds(
    edit: Callable[[list[Tensor]], None], make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model, optimizer, stock, stock_optimizer = twins(make)
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
    for _ in range(2):
        accumulate(accumulator, _BATCHES)
        optimizer.zero_grad()
        norm = accumulator.fill_grad()
        tokens, targets = one_large_batch(_BATCHES)
        stock_optimizer.zero_grad()
        (loss_sum(stock, (tokens, targets)) / targets.numel()).backward()
        expected = clip_grad_norm_(stock.parameters(), 0.5)
        assert_same_but_for_rounding(norm, expected)
        assert_same_but_for_rounding(
            [param.grad for param in model.parameters()],
            [param.grad for param in stock.parameters()],
        )
        edit(list(model.parameters()))
        edit(list(stock.parameters()))
        assert accumulator.step() == norm
        stock_optimizer.step()
        assert_same_parameters(model, stock)
        kept = [param.grad for param in model.parameters()]
        assert all((grad is None) == (edit is _drop and k == 0) for k, grad in enumerate(kept))


def test_a_gradient_that_an_edit_heals_is_stepped_with() -> None:
    layer = nn.Linear(3, 1)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    start = layer.weight.detach().clone()
    with accumulator.micro_batch():
        layer(torch.tensor([[1.0, torch.inf, 1.0]])).sum().backward()
    accumulator.fill_grad()
    layer.weight.grad.nan_to_num_(posinf=2.0)
    accumulator.step()
    assert not accumulator.step_was_skipped
    torch.testing.assert_close(layer.weight, start - torch.tensor([[1.0, 2.0, 1.0]]))


def test_values_are_clipped_once() -> None:
    layer = nn.Linear(3, 1)
    accumulator = GradientAccumulator(
        layer, torch.optim.SGD(layer.parameters(), lr=1.0), clip_value=0.5
    )
    with accumulator.micro_batch():
        layer(torch.tensor([[0.25, 1.0, 2.0]])).sum().backward()
    accumulator.fill_grad()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.25, 0.5, 0.5]]))
    layer.weight.grad.mul_(4)
    start = layer.weight.detach().clone()
    accumulator.step()
    torch.testing.assert_close(layer.weight, start - torch.tensor([[1.0, 2.0, 2.0]]))


def test_low_precision_keeps_the_digits_below_its_rounding() -> None:
    steps = []
    for look in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(16, 4, dtype=torch.bfloat16)
        accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=1e-3))
        for size in (3, 5):
            with accumulator.micro_batch(size):
                layer(torch.randn(size, 16).bfloat16()).float().square().sum().backward()
        if look:
            accumulator.fill_grad()
            assert layer.weight.grad.dtype == torch.bfloat16
        accumulator.step()
        steps.append(accumulator.state_dict()["master.weight"])
    assert_same_but_for_rounding(steps[0], steps[1])


def test_with_a_scaler() -> None:
    layer = nn.Linear(3, 1)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with accumulator.micro_batch(2):
        scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
    accumulator.fill_grad(scaler)
    torch.testing.assert_close(layer.weight.grad, torch.ones(1, 3))
    start = layer.weight.detach().clone()
    accumulator.step(scaler)
    scaler.update()
    torch.testing.assert_close(layer.weight, start - 1)
