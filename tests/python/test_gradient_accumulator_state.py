"""GradientAccumulator: half-full windows, master weights and optimizers survive a restart."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
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
from rounding_bounds import assert_same_but_for_rounding
from torch import nn

import torch_ext
from torch_ext import GradientAccumulator

_BATCHES = token_batches((3, 1, 4, 2, 2, 3))


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _checkpoint(model: nn.Module, accumulator: GradientAccumulator) -> dict[str, Any]:
    return _through_a_file(
        {
            "model": model.state_dict(),
            "optimizer": accumulator.optimizer.state_dict(),
            "accumulator": accumulator.state_dict(),
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "order",
    [("model", "optimizer", "accumulator"), ("accumulator", "optimizer", "model")],
    ids=["accumulator last", "accumulator first"],
)
def test_a_half_full_window_resumes_bit_by_bit(dtype: torch.dtype, order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = TiedModel().to(dtype)
    accumulator = GradientAccumulator(model, _adamw(model.parameters()), max_norm=0.5)
    accumulate(accumulator, _BATCHES[:2])
    accumulator.step()
    accumulate(accumulator, _BATCHES[2:4])
    checkpoint = _checkpoint(model, accumulator)

    torch.manual_seed(9)
    resumed = TiedModel().to(dtype)
    resumed_accumulator = GradientAccumulator(resumed, _adamw(resumed.parameters()), max_norm=0.5)
    holders = {
        "model": resumed,
        "optimizer": resumed_accumulator.optimizer,
        "accumulator": resumed_accumulator,
    }
    for name in order:
        holders[name].load_state_dict(checkpoint[name])
    assert resumed_accumulator.micro_batches == 2
    for each in (accumulator, resumed_accumulator):
        accumulate(each, _BATCHES[4:])
    assert torch.equal(accumulator.step(), resumed_accumulator.step())
    assert torch.equal(accumulator.gradient_noise_scale, resumed_accumulator.gradient_noise_scale)
    for each in (accumulator, resumed_accumulator):
        accumulate(each, _BATCHES[:3])
        each.step()
    assert_same_parameters(resumed, model, exactly=True)


def test_a_state_is_a_snapshot() -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    accumulate(accumulator, _BATCHES[:2])
    state = accumulator.state_dict()
    values = {name: tensor.clone() for name, tensor in state.items()}
    accumulate(accumulator, _BATCHES[2:4])
    first = accumulator.state_dict()
    accumulator.step()
    accumulate(accumulator, _BATCHES[:1])
    for name, value in values.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True)
    # And back again: what came in between is forgotten.
    accumulator.load_state_dict(state)
    accumulate(accumulator, _BATCHES[2:4])
    again = accumulator.state_dict()
    assert again.keys() == first.keys()
    for name in first:
        torch.testing.assert_close(again[name], first[name], rtol=0, atol=0, equal_nan=True)


_CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from accumulation_models import TiedModel, loss_sum, token_batches
from torch_ext import GradientAccumulator

folder, kill_at = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = TiedModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
done = 0
path = os.path.join(folder, "checkpoint.pt")
if os.path.exists(path):
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    accumulator.load_state_dict(checkpoint["accumulator"])
    done = checkpoint["done"]
for number, batch in enumerate(token_batches((3, 1, 4, 2, 2, 3, 1, 2))):
    if number < done:
        continue
    with accumulator.micro_batch(weight=batch[1].numel()):
        loss_sum(model, batch).backward()
    if number == kill_at:
        os.kill(os.getpid(), 9)
    if number % 4 == 3:
        accumulator.step()
    torch.save(
        dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
             accumulator=accumulator.state_dict(), done=number + 1),
        path + ".new",
    )
    os.replace(path + ".new", path)
torch.save(model.state_dict(), os.path.join(folder, "trained.pt"))
"""


def test_kill_9_in_the_middle_of_a_window_and_resume(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": str(Path(torch_ext.__file__).parents[1])}

    def train(folder: Path, kill_at: int) -> int:
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", _CHILD.format(tests=tests), str(folder), str(kill_at)],
            env=environment,
            check=False,
        ).returncode

    assert train(tmp_path / "killed", kill_at=5) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "trained.pt").exists()
    assert train(tmp_path / "killed", kill_at=-1) == 0
    assert train(tmp_path / "whole", kill_at=-1) == 0
    killed, whole = (
        torch.load(tmp_path / name / "trained.pt", weights_only=True)
        for name in ("killed", "whole")
    )
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["AdamW", "AdamW fused", "Adam", "SGD momentum", "SGD"],
)
def test_optimizer_states_are_interchangeable_with_stock_ones(make: Any) -> None:
    model, optimizer, stock, stock_optimizer = twins(make)
    accumulator = GradientAccumulator(model, optimizer)
    accumulate(accumulator, _BATCHES[:3])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES[:3])
    ours, theirs = optimizer.state_dict(), stock_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, expected in theirs["state"].items():
        actual = ours["state"][index]
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            if value is None:
                assert actual[name] is None
                continue
            assert actual[name].dtype == value.dtype
            assert actual[name].device == value.device
            assert_same_but_for_rounding(actual[name], value)
    # Each goes on with the other's.
    optimizer.load_state_dict(_through_a_file(theirs))
    stock_optimizer.load_state_dict(_through_a_file(ours))
    stock.load_state_dict(copy.deepcopy(model.state_dict()))
    accumulate(accumulator, _BATCHES[3:])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES[3:])
    assert_same_parameters(model, stock)


def test_low_precision_states_are_interchangeable_with_stock_ones() -> None:
    model, optimizer, stock, stock_optimizer = twins(_adamw, TiedModel().bfloat16())
    accumulator = GradientAccumulator(model, optimizer)
    accumulate(accumulator, _BATCHES[:3])
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES[:3])
    ours, theirs = optimizer.state_dict(), stock_optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    assert ours["state"][0].keys() == theirs["state"][0].keys()
    stock_optimizer.load_state_dict(_through_a_file(ours))
    assert stock_optimizer.state[next(stock.parameters())]["exp_avg"].dtype == torch.bfloat16
    stock_window(stock, stock_optimizer, _BATCHES[3:])
    optimizer.load_state_dict(_through_a_file(theirs))
    accumulate(accumulator, _BATCHES[3:])
    accumulator.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_states_of_wrapped_and_plain_models_are_the_same() -> None:
    model = TiedModel()
    plain = GradientAccumulator(model, _adamw(model.parameters()))
    accumulate(plain, _BATCHES[:2])
    other = TiedModel()
    compiled = torch.compile(other, backend="eager")
    wrapped = GradientAccumulator(compiled, _adamw(other.parameters()))
    wrapped.load_state_dict(plain.state_dict())
    assert wrapped.state_dict().keys() == plain.state_dict().keys()


def test_loading_replaces_the_window() -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    empty = copy.deepcopy(accumulator.state_dict())
    accumulate(accumulator, _BATCHES[:2])
    accumulator.load_state_dict(empty)
    assert accumulator.micro_batches == 0
    with pytest.raises(RuntimeError, match="takes at least one micro-batch, got none"):
        accumulator.step()


def test_states_of_other_models_are_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with accumulator.micro_batch(weight=2):
        model(torch.randn(2, 3)).sum().backward()
    before = copy.deepcopy(accumulator.state_dict())

    def state_of(other: nn.Module) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        return GradientAccumulator(other, optimizer).state_dict()

    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    longer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1))
    bias_free = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    incomplete = {name: value for name, value in before.items() if name != "weight"}
    for state, message in (
        (state_of(wider), r"where 0.weight has sizes \[4, 3\], got sizes \[5, 3\]"),
        (state_of(longer), "with 4 parameters, got one with 6"),
        (state_of(bias_free), "got one without parameter 0.bias"),
        (incomplete, "got one without 'weight'"),
        (before | {"sum.0.bias": torch.zeros(7)}, r"'sum.0.bias' takes sizes \[4\], got \[7\]"),
        ({}, "takes what state_dict"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            accumulator.load_state_dict(state)
    after = accumulator.state_dict()
    assert after.keys() == before.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_a_loss_sum_after_loading_into_another_dtype_of_sums() -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accumulate(accumulator, _BATCHES[:1])
    other = GradientAccumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), dtype=torch.float64
    )
    other.load_state_dict(accumulator.state_dict())
    state = other.state_dict()
    assert state["sum.norm.weight"].dtype == torch.float64
    with other.micro_batch(weight=1):
        loss_sum(model, _BATCHES[1]).backward()
    assert other.step().isfinite()
