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


def _free_held_entry(name: str) -> Callable[[GradientAccumulator], None]:
    """One that somebody holds: it would be copied before it is written."""

    def free(accumulator: GradientAccumulator) -> None:
        accumulator.held = accumulator.state_dict()[name]  # type: ignore[attr-defined]
        _free(accumulator.held)  # type: ignore[attr-defined]

    return free


def _free_parameter(accumulator: GradientAccumulator) -> None:
    _free(accumulator.model[1].weight.data)


def _free_moment(accumulator: GradientAccumulator) -> None:
    _free(accumulator.optimizer.state[accumulator.model[1].weight]["exp_avg"])


def _free_moment_of_another_dtype(accumulator: GradientAccumulator) -> None:
    _free_moment(accumulator)
    accumulator.model.double()


def _free_shown_gradient(accumulator: GradientAccumulator) -> None:
    accumulator.fill_grad()
    _free(accumulator.model[1].weight.grad)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "free"),
    [
        (torch.float32, "AdamW", _free_parameter),
        (torch.float32, "SGD", _free_parameter),
        (torch.float32, "AdamW", _free_moment),
        (torch.float32, "AdamW", _free_entry("sum.1.weight")),
        (torch.float32, "RMSprop", _free_entry("sum.1.weight")),
        (torch.bfloat16, "AdamW", _free_entry("sum.0.weight")),
        (torch.float32, "RMSprop", _free_held_entry("sum.1.weight")),
        (torch.bfloat16, "AdamW", _free_entry("master.1.weight")),
        (torch.bfloat16, "SGD", _free_held_entry("master.1.weight")),
        (torch.bfloat16, "RMSprop", _free_entry("master.1.weight")),
        (torch.bfloat16, "AdamW", _free_shown_gradient),
        (torch.float32, "AdamW", _free_moment_of_another_dtype),
    ],
)
def test_step(
    dtype: torch.dtype, optimizer: str, free: Callable[[GradientAccumulator], None]
) -> None:
    accumulator = _training(dtype, optimizer)
    free(accumulator)
    with pytest.raises(RuntimeError, match="storage was freed"):
        accumulator.step()


@pytest.mark.parametrize("name", ["noise", "first_square"])
def test_what_a_state_holds_beside_sums_and_masters_is_a_copy(name: str) -> None:
    steps = []
    for free in (False, True):
        accumulator = _training(torch.float32, "AdamW")
        _micro_batch(accumulator)
        accumulator.step()
        _micro_batch(accumulator)
        _micro_batch(accumulator)
        if free:
            _free(accumulator.state_dict()[name])
        accumulator.step()
        steps.append((accumulator.gradient_noise_scale, *accumulator.model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))


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
