"""GradientAccumulator: deep copies and pickles, with the model and the optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulation_models import TiedModel, accumulate, assert_same_parameters, token_batches
from torch import nn
from torch.optim import Optimizer

from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 4, 2))

Trained = tuple[nn.Module, Optimizer, GradientAccumulator]


def _half_full(dtype: torch.dtype) -> Trained:
    torch.manual_seed(0)
    model = TiedModel().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
    accumulate(accumulator, _BATCHES[:2])
    accumulator.step()
    accumulate(accumulator, _BATCHES[2:3])
    return model, optimizer, accumulator


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_by_itself(dtype: torch.dtype, copied: Callable[[Any], Any]) -> None:
    model, optimizer, accumulator = _half_full(dtype)
    other_model, other_optimizer, other = copied((model, optimizer, accumulator))
    assert other.model is other_model
    assert other.optimizer is other_optimizer
    assert other.max_norm == 0.5
    assert other.micro_batches == 1
    expected = accumulator.state_dict()
    state = other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)
    accumulate(accumulator, _BATCHES[3:])
    accumulator.step()
    assert other.micro_batches == 1
    accumulate(other, _BATCHES[3:])
    other.step()
    # Memory that is aligned in another way is multiplied in another order.
    assert_same_parameters(other_model, model, dtype)


def test_an_accumulator_alone_brings_its_model() -> None:
    model, _, accumulator = _half_full(torch.float32)
    other = copy.deepcopy(accumulator)
    assert other.model is not model
    held = {id(param) for group in other.optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in other.model.parameters()}
    other.step()
    assert accumulator.micro_batches == 1


def test_not_inside_a_micro_batch() -> None:
    _, _, accumulator = _half_full(torch.float32)
    for copied in (copy.deepcopy, _pickled):
        with (
            accumulator.micro_batch(),
            pytest.raises(RuntimeError, match="inside a micro_batch"),
        ):
            copied(accumulator)


def test_a_model_that_holds_its_accumulator() -> None:
    model, _, accumulator = _half_full(torch.float32)
    model.accumulator = accumulator
    with pytest.raises(RuntimeError, match="its own model holds"):
        copy.deepcopy(model)
