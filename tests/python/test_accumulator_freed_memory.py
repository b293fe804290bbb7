"""GradientAccumulator over freed storages: an error, and no window that is half written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_ext import GradientAccumulator

_TOKENS = torch.arange(6)


def _free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def _training(dtype: torch.dtype, optimizer: str) -> GradientAccumulator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype)
    kind = getattr(torch.optim, optimizer)
    accumulator = GradientAccumulator(model, kind(model.parameters(), lr=0.1))
    _micro_batch(accumulator)
    accumulator.step()
    _micro_batch(accumulator)
    return accumulator


def _micro_batch(accumulator: GradientAccumulator) -> None:
    with accumulator.micro_batch():
        accumulator.model(_TOKENS).float().square().sum().backward()


def _free_entry(name: str) -> Callable[[GradientAccumulator], None]:
    # The state shares the window's memory until that is written next.
    return lambda accumulator: _free(accumulator.state_dict()[name])


def _free_parameter(accumulator: GradientAccumulator) -> None:
    _free(accumulator.model[1].weight.data)


def _free_moment(accumulator: GradientAccumulator) -> None:
    _free(accumulator.optimizer.state[accumulator.model[1].weight]["exp_avg"])


@pytest.mark.parametrize(
    ("dtype", "optimizer", "free"),
    [
        (torch.float32, "AdamW", _free_parameter),
        (torch.float32, "SGD", _free_parameter),
        (torch.float32, "AdamW", _free_moment),
        (torch.float32, "AdamW", _free_entry("sum.1.weight")),
        (torch.float32, "RMSprop", _free_entry("sum.1.weight")),
        (torch.bfloat16, "AdamW", _free_entry("sum.0.weight")),
    ],
)
def test_step(
    dtype: torch.dtype, optimizer: str, free: Callable[[GradientAccumulator], None]
) -> None:
    accumulator = _training(dtype, optimizer)
    free(accumulator)
    with pytest.raises(RuntimeError, match="storage was freed"):
        accumulator.step()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_backward_that_adds_to_the_sum(layer: int) -> None:
    accumulator = _training(torch.float32, "SGD")
    _free(accumulator.state_dict()[f"sum.{layer}.weight"])
    with pytest.raises(RuntimeError, match="storage was freed"):
        _micro_batch(accumulator)


def test_a_layers_input() -> None:
    accumulator = _training(torch.float32, "SGD")
    model: Any = accumulator.model
    micro_batch = accumulator.micro_batch()
    with pytest.raises(RuntimeError, match="storage was freed"), micro_batch:  # noqa: PT012
        hidden = model[0](_TOKENS)
        loss = model[2](model[1](hidden)).sum()
        _free(hidden)
        loss.backward()


def test_another_window() -> None:
    accumulator = _training(torch.float32, "SGD")
    other = accumulator.new_core()
    other.add([1], [torch.ones(8, 8)], 1.0, None)
    _free(other.sums([1])[0])
    with pytest.raises(RuntimeError, match="storage was freed"):
        accumulator.merge(other)
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        accumulator.step()
    accumulator.reset()
    _micro_batch(accumulator)
    assert accumulator.step().isfinite()
