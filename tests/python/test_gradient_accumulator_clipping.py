"""Clipping as torch.nn.utils clips, and steps that are skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from accumulation_models import (
    accumulate,
    assert_same_parameters,
    loss_sum,
    one_large_batch,
    token_batches,
    twins,
)
from rounding_bounds import assert_same_but_for_rounding
from torch import nn

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 2))


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


@pytest.mark.parametrize("max_norm", [0.05, 1e9, None])
@pytest.mark.parametrize("norm_type", [1, 2.0, 3.5, math.inf, 0.5])
def test_norm_types_are_torchs(norm_type: float, max_norm: float | None) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer, max_norm=max_norm, norm_type=norm_type)
    for _ in range(2):
        accumulate(accumulator, _BATCHES)
        norm = accumulator.step()
        tokens, targets = one_large_batch(_BATCHES)
        stock_optimizer.zero_grad()
        (loss_sum(stock, (tokens, targets)) / targets.numel()).backward()
        limit = math.inf if max_norm is None else max_norm
        expected = nn.utils.clip_grad_norm_(stock.parameters(), limit, norm_type)
        stock_optimizer.step()
        assert_same_but_for_rounding(norm, expected)
        assert_same_parameters(model, stock)


@pytest.mark.parametrize("max_norm", [0.5, None])
@pytest.mark.parametrize(
    "make", [_sgd, lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: torch.optim.RMSprop(p)]
)
def test_values_are_clipped_after_the_norm(make: Any, max_norm: float | None) -> None:
    model, optimizer, stock, stock_optimizer = twins(make)
    accumulator = GradientAccumulator(model, optimizer, max_norm=max_norm, clip_value=2e-3)
    for _ in range(2):
        accumulate(accumulator, _BATCHES)
        accumulator.step()
        tokens, targets = one_large_batch(_BATCHES)
        stock_optimizer.zero_grad()
        (loss_sum(stock, (tokens, targets)) / targets.numel()).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(stock.parameters(), max_norm)
        nn.utils.clip_grad_value_(stock.parameters(), 2e-3)
        stock_optimizer.step()
        assert_same_parameters(model, stock)


def test_a_gradient_that_is_not_finite_raises_where_asked_to() -> None:
    model, optimizer, _, _ = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer, error_if_nonfinite=True)
    before = copy.deepcopy(model)
    with accumulator.micro_batch():
        (loss_sum(model, _BATCHES[0]) * math.inf).backward()
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 for gradients is non-finite"):
        accumulator.step()
    assert_same_parameters(model, before, exactly=True)
    accumulate(accumulator, _BATCHES)
    assert accumulator.step().isfinite()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("make", [_sgd, lambda p: torch.optim.RMSprop(p)])
def test_whether_the_step_was_skipped(make: Any, norm_type: float) -> None:
    model, optimizer, _, _ = twins(make)
    accumulator = GradientAccumulator(model, optimizer, norm_type=norm_type, clip_value=1.0)
    assert accumulator.step_was_skipped is False
    for factor in (1.0, math.inf, math.nan, 1.0):
        before = copy.deepcopy((model, optimizer.state_dict()))
        with accumulator.micro_batch():
            (loss_sum(model, _BATCHES[0]) * factor).backward()
        accumulator.step()
        assert accumulator.step_was_skipped is not math.isfinite(factor)
        if accumulator.step_was_skipped:
            assert_same_parameters(model, before[0], exactly=True)
            for state, earlier in zip(
                optimizer.state_dict()["state"].values(), before[1]["state"].values(), strict=True
            ):
                for name, value in state.items():
                    assert value is None or torch.equal(value, earlier[name])


def test_accelerates_schedulers_hear_of_a_skipped_step() -> None:
    from accelerate import Accelerator

    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    layer, prepared, scheduler = Accelerator(cpu=True).prepare(layer, optimizer, scheduler)
    accumulator = GradientAccumulator(layer, prepared)
    for factor, rate in ((1.0, 0.05), (math.inf, 0.05), (1.0, 0.025)):
        with accumulator.micro_batch():
            (layer(torch.ones(1, 2)).sum() * factor).backward()
        accumulator.step()
        scheduler.step()
        assert prepared.step_was_skipped is (factor == math.inf)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_window_without_gradients_is_torchs_no_op() -> None:
    model, optimizer, _, _ = twins(lambda p: torch.optim.AdamW(p, lr=0.1))
    accumulator = GradientAccumulator(model, optimizer, max_norm=1.0)
    before = copy.deepcopy(model)
    for weight in (0, 4):
        with accumulator.micro_batch(weight):
            pass
        assert accumulator.step() == 0
        assert accumulator.step_was_skipped is False
    assert not optimizer.state
    assert_same_parameters(model, before, exactly=True)
    with pytest.raises(RuntimeError, match="takes at least one micro-batch"):
        accumulator.step()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"clip_value": 0}, ValueError, "clip_value takes a number > 0 or None, got 0"),
        ({"clip_value": "1"}, TypeError, "clip_value takes a number > 0 or None, got '1'"),
        ({"norm_type": None}, TypeError, "norm_type takes a number, got None"),
        ({"norm_type": math.nan}, TypeError, "norm_type takes a number, got nan"),
    ],
)
def test_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    layer = nn.Linear(2, 1)
    with pytest.raises(kind, match=f"torch_ext.GradientAccumulator: {message}"):
        GradientAccumulator(layer, _sgd(layer.parameters()), **options)
