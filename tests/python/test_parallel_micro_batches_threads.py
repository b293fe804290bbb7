"""torch_ext.parallel_micro_batches: which threads its workers are, and what they leave behind."""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_models import Batch, TiedModel, loss_sum, token_batches
from torch import Tensor, nn

import torch_ext
from torch_ext import GradientAccumulator, parallel_micro_batches
from torch_ext.micro_batch_workers import _Run

_BATCHES = token_batches((3, 1, 4, 2, 2, 5, 1))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def _accumulator(model: nn.Module) -> GradientAccumulator:
    return GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.5))


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return loss_sum(model, batch), batch[1].numel()


def _mkl_threads() -> int:
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else torch.get_num_threads()


class _Wide(nn.Module):
    """Its matrix products (MKL's; oneDNN's in bf16), norms and sums are worth splitting."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 512, dropout=0.1, batch_first=True)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.convolution = nn.Conv1d(64, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.convolution(x.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _Wide()
    inputs = [torch.randn(rows, 96, 64) for rows in (8, 3, 9, 5)]

    def loss(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return module(x).float().square().sum(), len(x)

    windows = []
    for threads, workers in itertools.product((1, 2, 3, 4), (1, 2, 3, 4)):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        accumulator = _accumulator(model)
        mean = parallel_micro_batches(accumulator, loss, inputs, workers)
        windows.append(accumulator.state_dict() | {"loss": mean})
        assert torch.get_num_threads() == threads
    for other in windows[1:]:
        for name, value in windows[0].items():
            assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), name


def test_the_team_of_the_caller_works_and_is_as_it_was() -> None:
    product = torch.randn(300, 400), torch.randn(400, 500)
    before = (product[0] @ product[1], product[0].sum(), _mkl_threads(), torch.get_num_threads())
    meeting = threading.Barrier(2)
    seen: list[tuple[int, int, int]] = []

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        meeting.wait(60)
        seen.append((threading.get_ident(), torch.get_num_threads(), _mkl_threads()))
        return _loss(module, batch)

    accumulator = _accumulator(TiedModel())
    parallel_micro_batches(accumulator, loss, _BATCHES[:2], 2)
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        parallel_micro_batches(accumulator, loss, _BATCHES[:4], 2)
    assert len(os.listdir("/proc/self/task")) == tasks
    assert {entry[1:] for entry in seen} == {(1, 1)}
    callers = [entry[0] == threading.get_ident() for entry in seen]
    assert callers.count(True) == callers.count(False) == 7
    after = (product[0] @ product[1], product[0].sum(), _mkl_threads(), torch.get_num_threads())
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_more_workers_than_threads_are_a_pool() -> None:
    names: set[str] = set()
    meeting = threading.Barrier(3)

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        meeting.wait(60)
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == _mkl_threads() == 1
        return _loss(module, batch)

    parallel_micro_batches(_accumulator(TiedModel()), loss, _BATCHES[:6], 3)
    assert len(names) == 3
    assert all(name.startswith("torch_ext micro-batches") for name in names)


def test_calls_inside_of_micro_batches() -> None:
    """The outer workers are in a parallel region; the inner ones cannot be."""
    results = []
    for workers in (1, 2):
        torch.manual_seed(0)
        inner, outer = TiedModel(), TiedModel()
        sums: dict[int, Tensor] = {}

        def loss(
            module: nn.Module,
            item: tuple[int, Batch],
            workers: int = workers,
            inner: nn.Module = inner,
            sums: dict[int, Tensor] = sums,
        ) -> tuple[Tensor, int]:
            accumulator = _accumulator(copy.deepcopy(inner))
            sums[item[0]] = parallel_micro_batches(accumulator, _loss, _BATCHES, workers)
            return _loss(module, item[1])

        accumulator = _accumulator(outer)
        mean = parallel_micro_batches(accumulator, loss, enumerate(_BATCHES), workers)
        results.append([mean, *(sums[number] for number in sorted(sums))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("where", ["loss_fn", "micro_batches", "between"])
def test_ctrl_c(where: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = _accumulator(TiedModel())
    parallel_micro_batches(accumulator, _loss, _BATCHES[:2], workers)
    before = copy.deepcopy(accumulator.state_dict())
    pressed: list[int] = []

    def press(number: int) -> None:
        """Python handles a signal in the main thread, wherever it is by then."""
        if number >= 2 and not pressed:
            pressed.append(number)
            os.kill(os.getpid(), signal.SIGINT)

    def batches() -> Iterator[tuple[int, Batch]]:
        for number in itertools.count():  # without an end: only Ctrl-C ends it
            if where == "micro_batches":
                press(number)
            yield number, _BATCHES[number % len(_BATCHES)]

    def loss(module: nn.Module, item: tuple[int, Batch]) -> tuple[Tensor, int]:
        if where == "loss_fn":
            press(item[0])
        return _loss(module, item[1])

    take = _Run._take

    def take_later(run: _Run) -> Any:
        if where == "between":
            press(run._taken)
        return take(run)

    monkeypatch.setattr(_Run, "_take", take_later)
    with pytest.raises(KeyboardInterrupt):
        parallel_micro_batches(accumulator, loss, batches(), workers)
    assert pressed
    for name, value in accumulator.state_dict().items():
        torch.testing.assert_close(before[name], value, rtol=0, atol=0, equal_nan=True)
    parallel_micro_batches(accumulator, _loss, _BATCHES[2:], workers)
    assert accumulator.step().isfinite()


_FORKING = """
import multiprocessing
import torch
from accumulation_models import TiedModel, loss_sum, token_batches
from torch_ext import GradientAccumulator, parallel_micro_batches

torch.set_num_threads(2)
model = TiedModel()
accumulator = GradientAccumulator(model, torch.optim.SGD(model.parameters(), lr=0.5))

def train():
    loss = lambda model, batch: (loss_sum(model, batch), batch[1].numel())
    parallel_micro_batches(accumulator, loss, token_batches((3, 1, 4, 2)), 2)

train()
child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join(60)
assert child.exitcode == 0, child.exitcode
train()
"""


def test_a_forked_process() -> None:
    # In a process of its own: where other tests have run a backward pass on another device, torch
    # refuses every backward pass after a fork.
    folders = [str(Path(torch_ext.__file__).parents[1]), str(Path(__file__).parent)]
    run = subprocess.run(
        [sys.executable, "-c", _FORKING],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
