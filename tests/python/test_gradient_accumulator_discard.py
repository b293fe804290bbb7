"""A micro-batch that is discarded from inside leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from accumulation_models import (
    accumulate,
    assert_same_parameters,
    loss_sum,
    stock_window,
    token_batches,
    twins,
)
from torch import nn

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 2))


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "separate", "after_backward"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"add_in_backward": False}, False, True),
    ],
    ids=["before backward", "separate", "add_in_backward=False"],
)
def test_the_others_make_the_step(
    bad: int, options: dict[str, bool], separate: bool, after_backward: bool
) -> None:
    model, optimizer, stock, stock_optimizer = twins(
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)
    )
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5, **options)
    for number, batch in enumerate(_BATCHES):
        with accumulator.micro_batch(batch[1].numel(), separate=separate) as micro_batch:
            loss = loss_sum(model, batch)
            if number == bad and not after_backward:
                micro_batch.discard()
                continue
            (loss * (math.nan if number == bad else 1.0)).backward()
            if number == bad:
                assert not all(p.grad.isfinite().all() for p in model.parameters())
                micro_batch.discard()
    assert accumulator.micro_batches == 2
    accumulator.step()
    assert not accumulator.step_was_skipped
    good = [batch for number, batch in enumerate(_BATCHES) if number != bad]
    stock_window(stock, stock_optimizer, good, max_norm=0.5)
    assert_same_parameters(model, stock)
    assert all(param.grad is None for param in model.parameters())
    # Nothing of it comes later either.
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES, max_norm=0.5)
    assert_same_parameters(model, stock)


def test_the_first_of_a_window_may_be_discarded_after_its_backward() -> None:
    layer = nn.Linear(3, 2)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    with accumulator.micro_batch() as micro_batch:
        (layer(torch.ones(1, 3)).sum() * math.nan).backward()
        micro_batch.discard()
    assert accumulator.micro_batches == 0
    with accumulator.micro_batch():
        layer(torch.ones(1, 3)).sum().backward()
    assert accumulator.step().isfinite()


def test_too_late() -> None:
    layer = nn.Linear(3, 2)
    accumulator = GradientAccumulator(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for _ in range(2):
        with accumulator.micro_batch() as micro_batch:
            layer(torch.ones(1, 3)).sum().backward()
            if accumulator.micro_batches:
                with pytest.raises(RuntimeError, match=r"micro_batch\(weight, separate=True\)"):
                    micro_batch.discard()
    # Said, not done: the window is whole.
    assert accumulator.micro_batches == 2
    with pytest.raises(RuntimeError, match="takes an open micro_batch"):
        micro_batch.discard()
    with accumulator.micro_batch(), pytest.raises(RuntimeError, match="takes an open micro_batch"):
        micro_batch.discard()
