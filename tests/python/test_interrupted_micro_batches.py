"""Ctrl-C in micro_batch(), step() and parallel_micro_batches: everything is as documented after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from interruptions import interrupted_at_every_step, interrupted_by_signals
from torch import Tensor, nn

import torch_ext
from torch_ext import GradientAccumulator

State = dict[str, Tensor]
_DEFAULT_GENERATOR = torch.random.default_generator
_INPUTS = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 2, 4)]


def _loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    return model(batch).square().sum(), float(len(batch))


class _Training:
    """A model, an accumulator, and what must hold after whatever has happened."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 1))
        self.model[0].bias.grad = torch.ones(6)  # somebody's, before all of it
        kind = getattr(torch.optim, optimizer)
        self.optimizer = kind(self.model.parameters(), lr=1e-2)
        self.accumulator = GradientAccumulator(self.model, self.optimizer, max_norm=1.0)
        self.micro_batch(_INPUTS[0])
        self.accumulator.step()
        self.start = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.begin()
        self.before = self.window()
        self.whole = self.result()

    def begin(self) -> None:
        """The same window of one micro-batch, on the same parameters."""
        self.accumulator.reset()
        self.model.load_state_dict(self.start[0])
        self.optimizer.load_state_dict(copy.deepcopy(self.start[1]))
        torch.manual_seed(1)
        self.micro_batch(_INPUTS[0])

    def micro_batch(self, batch: Tensor) -> None:
        torch.manual_seed(2)
        with self.accumulator.micro_batch(weight=len(batch)):
            _loss(self.model, batch)[0].backward()

    def parallel(self, workers: int) -> None:
        torch.manual_seed(3)
        torch_ext.parallel_micro_batches(self.accumulator, _loss, _INPUTS, workers=workers)

    def result(self) -> State:
        self.begin()
        self.micro_batch(_INPUTS[1])
        self.parallel(1)
        state = self.window()
        self.accumulator.reset()
        return state

    def window(self) -> State:
        """What it holds, but for what the noise scale wants to know."""
        state = self.accumulator.state_dict()
        of_noise = ("noise", "first_square")
        return {name: value.clone() for name, value in state.items() if name not in of_noise}

    def check(self) -> None:
        """Nothing is left behind; reset() works, and what begin() begins with is what it was."""
        assert torch.random.default_generator is _DEFAULT_GENERATOR
        torch.manual_seed(5)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), drawn)
        assert not any("forward" in vars(module) for module in self.model.modules())
        assert not self.accumulator._core.is_open()
        for name, param in self.model.named_parameters():
            if name == "0.bias":
                assert torch.equal(param.grad, torch.ones(6))
            else:
                assert param.grad is None
        self.begin()
        _assert_equal(self.window(), self.before)

    def check_whole(self) -> None:
        """The same bits come out as ever."""
        _assert_equal(self.result(), self.whole)

    def window_or_lost(self) -> State | None:
        try:
            return self.window()
        except RuntimeError as error:
            if "call reset()" not in str(error):
                raise
            return None


def _assert_equal(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True)


def _is_equal(actual: State, expected: State) -> bool:
    try:
        _assert_equal(actual, expected)
    except AssertionError:
        return False
    return True


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def _after_one_more(training: _Training, call: Callable[[], None]) -> State:
    training.begin()
    call()
    return training.window()


def _assert_before_or_after(training: _Training, after: State) -> str:
    window = training.window_or_lost()
    if window is None:
        return "lost"
    if _is_equal(window, training.before):
        return "before"
    _assert_equal(window, after)
    return "after"


def test_micro_batch_at_every_step() -> None:
    training = _Training()
    call = lambda: training.micro_batch(_INPUTS[1])  # noqa: E731
    after = _after_one_more(training, call)
    seen = set()
    training.begin()
    for _ in interrupted_at_every_step(call):
        seen.add(_assert_before_or_after(training, after))
        training.check()
    training.check_whole()
    assert seen >= {"before", "after"}


@pytest.mark.parametrize("workers", [1, 3])
def test_parallel_micro_batches_at_every_step(workers: int) -> None:
    training = _Training()
    call = lambda: training.parallel(workers)  # noqa: E731
    after = _after_one_more(training, call)
    seen = set()
    training.begin()
    for _ in interrupted_at_every_step(call):
        seen.add(_assert_before_or_after(training, after))
        training.check()
    training.check_whole()
    assert seen == {"before", "after"}


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop"])
def test_step_at_every_step(optimizer: str) -> None:
    training = _Training(optimizer)
    training.begin()
    parameters = copy.deepcopy(training.model.state_dict())
    training.accumulator.step()
    stepped = copy.deepcopy(training.model.state_dict())
    training.begin()
    for _ in interrupted_at_every_step(training.accumulator.step):
        window = training.window()
        now = training.model.state_dict()
        if training.accumulator.micro_batches:
            # Not begun: the step may be taken now.
            _assert_equal(window, training.before)
            _assert_equal(now, parameters)
            training.accumulator.step()
            _assert_equal(training.model.state_dict(), stepped)
        else:
            assert _is_equal(now, parameters) or _is_equal(now, stepped)
        training.check()
    training.check_whole()


def test_micro_batch_and_step_by_signals() -> None:
    training = _Training()

    def window() -> None:
        for batch in _INPUTS:
            training.micro_batch(batch)
        training.accumulator.step()

    hits = 0
    for hit in interrupted_by_signals(window, times=200, longest=4e-3):
        hits += hit
        training.check()
    training.check_whole()
    assert hits > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_parallel_micro_batches_by_signals(workers: int) -> None:
    training = _Training()
    training.begin()
    hits = 0
    for hit in interrupted_by_signals(lambda: training.parallel(workers), 100, longest=4e-3):
        hits += hit
        assert training.accumulator.micro_batches in (1, 1 + len(_INPUTS))
        training.check()
    training.check_whole()
    assert hits > 0


def test_reset_ends_a_micro_batch_that_nobody_will() -> None:
    training = _Training()
    training.accumulator.micro_batch().__enter__()
    assert "forward" in vars(training.model[0])
    training.accumulator.reset()
    training.check()
