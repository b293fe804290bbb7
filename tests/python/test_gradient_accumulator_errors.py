"""What GradientAccumulator refuses, and what a micro-batch that fails leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accumulation_models import (
    TiedModel,
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


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def _accumulator(model: nn.Module | None = None, **options: Any) -> GradientAccumulator:
    model = nn.Linear(3, 2) if model is None else model
    return GradientAccumulator(model, _sgd(model.parameters()), **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_norm": 0.0}, ValueError, "max_norm takes a number > 0 or None, got 0.0"),
        ({"max_norm": -1}, ValueError, "max_norm takes a number > 0 or None, got -1"),
        ({"max_norm": float("nan")}, ValueError, "max_norm takes a number > 0 or None, got nan"),
        ({"max_norm": "1"}, TypeError, "max_norm takes a number > 0 or None, got '1'"),
        ({"max_norm": True}, TypeError, "max_norm takes a number > 0 or None, got True"),
        ({"dtype": torch.int32}, ValueError, "dtype takes torch.float32, .* got torch.int32"),
        ({"dtype": torch.complex64}, ValueError, "dtype takes .* got torch.complex64"),
        ({"dtype": "float32"}, ValueError, "dtype takes .* got float32"),
    ],
)
def test_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"torch_ext.GradientAccumulator: {message}"):
        _accumulator(**options)


def test_max_norm_set_later() -> None:
    accumulator = _accumulator(max_norm=2.0)
    with pytest.raises(ValueError, match="max_norm takes a number > 0 or None, got 0"):
        accumulator.max_norm = 0
    assert accumulator.max_norm == 2.0


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (-1, ValueError, "weight takes a finite number >= 0, got -1"),
        (float("nan"), ValueError, "weight takes a finite number >= 0, got nan"),
        (float("inf"), ValueError, "weight takes a finite number >= 0, got inf"),
        (torch.tensor(-2), ValueError, "weight takes a finite number >= 0, got -2"),
        (torch.ones(2), ValueError, r"weight takes .* got torch.float32 of sizes \(2,\)"),
        (torch.ones((), dtype=torch.complex64), ValueError, "weight takes .* got torch.complex64"),
        (True, TypeError, "weight takes .* got bool"),
        ("3", TypeError, "weight takes .* got str"),
        (None, TypeError, "weight takes .* got NoneType"),
    ],
)
def test_weights(weight: Any, kind: type[Exception], message: str) -> None:
    model = nn.Linear(3, 2)
    accumulator = _accumulator(model)
    with accumulator.micro_batch(weight=2):
        model(torch.ones(2, 3)).sum().backward()
    before = copy.deepcopy(accumulator.state_dict())
    with pytest.raises(kind, match=f"torch_ext.GradientAccumulator: {message}"):
        accumulator.micro_batch(weight)
    # Found out late, when the micro-batch ends: nothing of it stays, even so.
    fresh = _accumulator(model)

    def late() -> None:
        with fresh.micro_batch() as micro_batch:
            model(torch.ones(2, 3)).sum().backward()
            micro_batch.weight = weight

    with pytest.raises(kind, match=message):
        late()
    assert fresh.micro_batches == 0
    after = accumulator.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_models() -> None:
    optimizer = _sgd([nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match=r"model takes an nn\.Module, or several, got list"):
        GradientAccumulator([], optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model takes a module with parameters, got one without"):
        GradientAccumulator(nn.ReLU(), optimizer)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="model takes initialised parameters, weight is not"):
        GradientAccumulator(lazy, optimizer)
    meta = nn.Linear(3, 2, device="meta")
    with pytest.raises(ValueError, match="model takes parameters with memory, weight is on meta"):
        _accumulator(meta)
    unreal = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="parameter weight takes a real tensor; complex"):
        _accumulator(unreal)
    sparse = nn.ParameterList([torch.eye(3).to_sparse()])
    with pytest.raises(RuntimeError, match="parameter 0 takes a dense tensor; sparse"):
        _accumulator(sparse)


def test_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with pytest.raises(
        TypeError, match=r"takes a torch\.optim\.Optimizer, or several, got NoneType"
    ):
        GradientAccumulator(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got one without 1\.weight and 1 more"):
        GradientAccumulator(model, _sgd(model[0].parameters()))
    with pytest.raises(ValueError, match=r"model's parameters only, got others: one of sizes \(2,"):
        GradientAccumulator(model[0], _sgd(nn.ModuleList([model[0], nn.Linear(2, 2)]).parameters()))
    with pytest.raises(ValueError, match="steps without a closure, got LBFGS"):
        GradientAccumulator(model, torch.optim.LBFGS(model.parameters()))
    # What is frozen need not be held.
    model[1].requires_grad_(False)
    accumulator = GradientAccumulator(model, _sgd(model[0].parameters()))
    model[1].requires_grad_(True)
    with accumulator.micro_batch():
        model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1\.weight has a gradient, but the optimizer"):
        accumulator.step()
    accumulator.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with accumulator.micro_batch():
        model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="has been given parameters that are not the model's"):
        accumulator.step()


def test_order_of_calls() -> None:
    model = TiedModel()
    accumulator = _accumulator(model)
    state = _accumulator(model).state_dict()
    with pytest.raises(RuntimeError, match="takes at least one micro-batch, got none"):
        accumulator.step()
    with accumulator.micro_batch():
        for call, message in (
            (accumulator.step, r"step\(\) inside a micro_batch"),
            (accumulator.state_dict, r"state_dict\(\) inside a micro_batch"),
            (lambda: accumulator.load_state_dict(state), r"load_state_dict\(\) inside a micro_b"),
            (accumulator.micro_batch().__enter__, r"micro_batch\(\) inside a micro_batch"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        loss_sum(model, _BATCHES[0]).backward()
    assert accumulator.micro_batches == 1
    accumulator.step()
    with pytest.raises(RuntimeError, match="takes at least one micro-batch, got none"):
        accumulator.step()


def test_backward_outside_the_micro_batch() -> None:
    model = TiedModel()
    accumulator = _accumulator(model)
    with accumulator.micro_batch():
        loss = loss_sum(model, _BATCHES[0])
    loss.backward()
    before = copy.deepcopy(model)
    assert accumulator.step() == 0  # as torch.optim steps where there is no gradient
    assert_same_parameters(model, before, exactly=True)
    assert accumulator.micro_batches == 0


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    accumulator = _accumulator(embedding)
    with (
        pytest.raises(RuntimeError, match="the gradient of weight takes a dense tensor; sparse"),
        accumulator.micro_batch(),
    ):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert accumulator.micro_batches == 0
    assert embedding.weight.grad is None


def test_scalers() -> None:
    model = TiedModel()
    accumulator = _accumulator(model)
    scaler = torch.amp.GradScaler("cpu")
    accumulate(accumulator, _BATCHES)
    with pytest.raises(RuntimeError, match="scaler takes one that has scaled the losses"):
        accumulator.step(scaler)
    accumulator.reset()
    for _ in range(2):
        with accumulator.micro_batch():
            scaler.scale(loss_sum(model, _BATCHES[0])).backward()
        if scaler._per_optimizer_states:
            with pytest.raises(RuntimeError, match=r"call scaler.update\(\) after each step"):
                accumulator.step(scaler)
        else:
            accumulator.step(scaler)


def _fail(
    accumulator: GradientAccumulator, batch: tuple[torch.Tensor, torch.Tensor], backward: bool
) -> None:
    with accumulator.micro_batch(weight=1000):
        loss = loss_sum(accumulator.model, batch)
        if backward:
            loss.backward()
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("where", "add_in_backward"),
    [
        ("forward", True),
        ("forward", False),
        ("after backward", False),
        ("first backward", True),
        ("first backward", False),
    ],
)
def test_a_micro_batch_that_fails_leaves_no_trace(where: str, add_in_backward: bool) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer, add_in_backward=add_in_backward)
    if where != "first backward":
        accumulate(accumulator, _BATCHES[:1])
    with pytest.raises(ZeroDivisionError):
        _fail(accumulator, _BATCHES[0], backward=where != "forward")
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    if where == "first backward":
        accumulate(accumulator, _BATCHES[:1])
    accumulate(accumulator, _BATCHES[1:])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_sums_that_a_failed_backward_has_changed_are_not_used() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    accumulate(accumulator, _BATCHES[:1])
    with pytest.raises(ZeroDivisionError):
        _fail(accumulator, _BATCHES[1], backward=True)
    for call in (accumulator.step, accumulator.state_dict, accumulator.micro_batch().__enter__):
        with pytest.raises(RuntimeError, match=r"had begun to add .* call reset\(\)"):
            call()
    accumulator.reset()
    accumulate(accumulator, _BATCHES)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_an_optimizer_that_fails_ends_the_window() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise ZeroDivisionError

    model = TiedModel()
    accumulator = GradientAccumulator(model, Failing(model.parameters(), lr=0.1))
    accumulate(accumulator, _BATCHES)
    with pytest.raises(ZeroDivisionError):
        accumulator.step()
    assert accumulator.micro_batches == 0
    assert all(parameter.grad is None for parameter in model.parameters())
