"""Calls that a plain loop has, and that do nothing beside an accumulator, are said once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from torch_ext import GradientAccumulator


def _layer() -> tuple[nn.Linear, torch.optim.Optimizer, GradientAccumulator]:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return layer, optimizer, GradientAccumulator(layer, optimizer)


def _window(layer: nn.Linear, accumulator: GradientAccumulator) -> None:
    with accumulator.micro_batch():
        layer(torch.ones(1, 3)).sum().backward()


def _said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [f"{warning.filename}: {warning.message}" for warning in caught]


def test_the_optimizers_step() -> None:
    layer, optimizer, accumulator = _layer()
    _window(layer, accumulator)
    (said,) = _said(optimizer.step)
    assert "optimizer.step() was called while the window holds gradients" in said
    assert accumulator.micro_batches == 1
    accumulator.step()
    assert _said(optimizer.step) == []  # once

    layer, optimizer, accumulator = _layer()
    _window(layer, accumulator)
    accumulator.step()
    (said,) = _said(optimizer.step)
    assert "accumulator.step() has stepped the optimizer already" in said
    assert said.startswith(__file__) or "optimizer.py" in said


def test_steps_that_mean_something_pass() -> None:
    layer, optimizer, accumulator = _layer()
    layer(torch.ones(1, 3)).sum().backward()
    assert _said(optimizer.step) == []
    optimizer.zero_grad()

    def closure() -> torch.Tensor:
        loss = layer(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    assert _said(lambda: optimizer.step(closure)) == []
    hooked = torch.optim.RMSprop(layer.parameters())
    accumulator = GradientAccumulator(layer, hooked)
    _window(layer, accumulator)
    assert _said(accumulator.step) == []


@pytest.mark.parametrize(
    "clip",
    [
        lambda p: clip_grad_norm_(p, 1.0),
        lambda p: utils.clip_grad_norm_(list(p), 1.0),
        lambda p: utils.clip_grad.clip_grad_norm_(next(p), 1.0),
    ],
)
def test_clipping(clip: Callable[[object], object]) -> None:
    theirs = (utils.clip_grad_value_, utils.clip_grad._clip_grads_with_norm_)
    layer, _, accumulator = _layer()
    assert _said(lambda: clip(layer.parameters())) == []
    _window(layer, accumulator)
    (said,) = _said(lambda: clip(layer.parameters()))
    assert "was called while the window holds gradients" in said
    assert "max_norm or clip_value" in said
    assert _said(lambda: clip(layer.parameters())) == []
    accumulator.step()
    # Another model's gradients are its own business.
    _window(layer, accumulator)
    other = nn.Linear(3, 2)
    other(torch.ones(1, 3)).sum().backward()
    assert _said(lambda: clip(other.parameters())) == []
    accumulator.reset()
    assert theirs == (utils.clip_grad_value_, utils.clip_grad._clip_grads_with_norm_)


@pytest.mark.parametrize("module", [utils, utils.clip_grad])
def test_clipping_by_value(module: Any) -> None:
    layer, _, accumulator = _layer()
    _window(layer, accumulator)
    # torch refuses parameters without gradients here, in words of its own.
    with pytest.warns(UserWarning, match="max_norm or clip_value"), pytest.raises(RuntimeError):
        module.clip_grad_value_(layer.parameters(), 1.0)


def test_clipping_clips_what_there_is_as_ever() -> None:
    layer, _, accumulator = _layer()
    _window(layer, accumulator)
    other = nn.Linear(3, 2)
    other(torch.full((1, 3), 5.0)).sum().backward()
    norm = clip_grad_norm_(other.parameters(), 1.0)
    assert norm > 1
    torch.testing.assert_close(
        utils.get_total_norm([p.grad for p in other.parameters()]).item(), 1.0
    )
    clip_grad_value_(other.parameters(), 0.01)
    utils.clip_grad_value_(other.parameters(), 0.01)
    assert max(p.grad.abs().max() for p in other.parameters()) <= 0.01


def test_an_accumulator_that_is_gone_says_nothing() -> None:
    layer, optimizer, accumulator = _layer()
    _window(layer, accumulator)
    del accumulator
    gc.collect()
    assert _said(optimizer.step) == []
    assert not optimizer._optimizer_step_pre_hooks
    assert _said(lambda: clip_grad_norm_(layer.parameters(), 1.0)) == []
