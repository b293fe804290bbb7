"""torch_ext.parallel_micro_batches: bitwise the same for any number of workers."""

from __future__ import annotations

import contextvars
import copy
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accumulation_models import (
    Batch,
    TiedModel,
    accumulate,
    assert_same_parameters,
    loss_sum,
    stock_window,
    token_batches,
    twins,
)
from rounding_bounds import assert_same_but_for_rounding
from torch import Tensor, nn

from torch_ext import GradientAccumulator, parallel_micro_batches
from torch_ext.micro_batch_gradients import SeparateWindow
from torch_ext.micro_batch_streams import run_on_streams

_BATCHES = token_batches((3, 1, 4, 2, 2, 5, 1))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return loss_sum(model, batch), batch[1].numel()


@pytest.mark.parametrize("workers", [1, 2, 5, None])
def test_is_one_large_batch(workers: int | None) -> None:
    model, optimizer, stock, stock_optimizer = twins(lambda p: torch.optim.AdamW(p, lr=1e-2))
    accumulator = GradientAccumulator(model, optimizer, max_norm=0.5)
    for window in range(2):
        batches = token_batches((3, 1, 4, 2), seed=window)
        loss = parallel_micro_batches(accumulator, _loss, batches, workers)
        assert accumulator.micro_batches == 4
        with torch.no_grad():
            total = sum(loss_sum(stock, batch) for batch in batches)
        tokens = sum(targets.numel() for _, targets in batches)
        assert_same_but_for_rounding(loss, total / tokens)
        norm = accumulator.step()
        expected = stock_window(stock, stock_optimizer, batches, max_norm=0.5)
        assert_same_but_for_rounding(norm, expected)
        assert_same_parameters(model, stock)


def test_adds_to_a_window_that_has_begun() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    accumulate(accumulator, _BATCHES[:2])
    parallel_micro_batches(accumulator, _loss, _BATCHES[2:5], 2)
    accumulate(accumulator, _BATCHES[5:])
    assert accumulator.micro_batches == len(_BATCHES)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)
    assert accumulator.gradient_noise_scale.isfinite()


def test_micro_batches_come_from_any_iterable_as_they_are_needed() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    finished: list[int] = []
    furthest: list[int] = []

    def batches() -> Iterator[tuple[int, Batch]]:
        for number, batch in enumerate(_BATCHES):
            furthest.append(number - len(finished))
            yield number, batch

    def loss(module: nn.Module, item: tuple[int, Batch]) -> tuple[Tensor, int]:
        result = _loss(module, item[1])
        finished.append(item[0])
        return result

    parallel_micro_batches(accumulator, loss, batches(), 2)
    assert max(furthest) <= 4
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_no_micro_batches() -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    assert parallel_micro_batches(accumulator, _loss, [], 2).isnan()
    assert accumulator.micro_batches == 0


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("where", ["loss_fn", "backward", "micro_batches"])
def test_an_error_reaches_the_caller_and_leaves_the_window(where: str, workers: int) -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    accumulate(accumulator, _BATCHES[:2])
    before = copy.deepcopy(accumulator.state_dict())

    class Unlucky(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return divide_by_zero(grad)

    def divide_by_zero(grad: Tensor) -> Tensor:
        return grad * (1 // 0)

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(_BATCHES):
            if number == 4 and where == "micro_batches":
                divide_by_zero(batch[0])
            yield batch

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        result = loss_sum(module, batch)
        if batch is _BATCHES[3] and where != "micro_batches":
            result = Unlucky.apply(result) if where == "backward" else divide_by_zero(result)
        return result, batch[1].numel()

    with pytest.raises(ZeroDivisionError) as error:
        parallel_micro_batches(accumulator, loss, batches(), workers)
    assert "divide_by_zero" in "".join(traceback.format_tb(error.value.__traceback__))
    notes = getattr(error.value, "__notes__", ["micro-batch 3"])
    assert any("micro-batch" in note for note in notes)
    after = accumulator.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)
    # And the workers go on working.
    parallel_micro_batches(accumulator, _loss, _BATCHES[2:], workers)
    assert accumulator.step().isfinite()


def test_workers_take_over_the_callers_state() -> None:
    model = nn.Linear(8, 4)
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[tuple[Any, ...]] = []

    def loss(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        out = module(x)
        seen.append((out.dtype, variable.get(), torch.get_num_threads()))
        return out.float().sum(), len(x)

    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor

    threads = torch.get_num_threads()
    variable.set("caller")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        parallel_micro_batches(accumulator, loss, [torch.randn(2, 8) for _ in range(4)], 2)
    assert seen == [(torch.bfloat16, "caller", 1)] * 4
    assert packed
    assert torch.get_num_threads() == threads
    seen.clear()
    parallel_micro_batches(accumulator, loss, [torch.randn(2, 8)], 2)
    assert seen[0][0] == torch.float32


def test_hooks_on_parameters_are_called() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    for module in (model, stock):
        module.twice.weight.register_hook(lambda grad: grad * 3.0)
    accumulator = GradientAccumulator(model, optimizer)
    parallel_micro_batches(accumulator, _loss, _BATCHES, 2)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_frozen_and_unused_parameters() -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    for module in (model, stock):
        module.convolution.requires_grad_(False)
        module.unused = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [model.unused]})
    accumulator = GradientAccumulator(model, optimizer)
    parallel_micro_batches(accumulator, _loss, _BATCHES, 2)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


def test_compiled_models(fresh_dynamo: None) -> None:
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    compiled = torch.compile(model, backend="aot_eager")
    accumulator = GradientAccumulator(compiled, optimizer)
    parallel_micro_batches(accumulator, _loss, _BATCHES[:3], 2)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES[:3])
    assert_same_parameters(model, stock)


def test_calls_from_several_threads_at_once() -> None:
    results: dict[int, dict[str, Tensor]] = {}

    def train(seed: int) -> None:
        model = copy.deepcopy(models[seed % 2])
        accumulator = GradientAccumulator(model, _sgd(model.parameters()))
        parallel_micro_batches(accumulator, _loss, _BATCHES, 2)
        accumulator.step()
        results[seed] = model.state_dict()

    models = [TiedModel(), TiedModel()]
    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (2, 3):
        for name, value in results[seed].items():
            assert torch.equal(value, results[seed - 2][name])


@pytest.mark.parametrize("streams", [1, 3])
def test_streams_add_in_order_what_one_thread_starts(streams: int) -> None:
    """The way of other devices, on the CPU's streams, which do everything at once."""
    model, optimizer, stock, stock_optimizer = twins(_sgd)
    accumulator = GradientAccumulator(model, optimizer)
    window = SeparateWindow(accumulator, _loss)
    run_on_streams(window, iter(_BATCHES), streams, torch.device("cpu"))
    assert accumulator.micro_batches == 0
    window.merge()
    assert accumulator.micro_batches == len(_BATCHES)
    accumulator.step()
    stock_window(stock, stock_optimizer, _BATCHES)
    assert_same_parameters(model, stock)


@pytest.mark.parametrize(
    ("workers", "kind", "message"),
    [
        (0, ValueError, "workers takes a number of at least 1, got 0"),
        (1.5, TypeError, "workers takes a whole number, got 1.5"),
        (True, TypeError, "workers takes a whole number, got True"),
    ],
)
def test_workers_argument(workers: Any, kind: type[Exception], message: str) -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    with pytest.raises(kind, match=message):
        parallel_micro_batches(accumulator, _loss, _BATCHES, workers)


def test_other_arguments() -> None:
    model = TiedModel()
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))
    with pytest.raises(TypeError, match="accumulator takes a GradientAccumulator, got TiedModel"):
        parallel_micro_batches(model, _loss, _BATCHES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn takes a function, got NoneType"):
        parallel_micro_batches(accumulator, None, _BATCHES)  # type: ignore[arg-type]
    for result, kind, message in (
        (lambda: torch.zeros(()), TypeError, r"returns \(summed loss, weight\), got .* Tensor"),
        (
            lambda: (torch.zeros(()), 1),
            TypeError,
            "loss of one element with a gradient, got one of",
        ),
        (lambda: (model.norm.weight, 1), TypeError, r"got one of sizes \(12,\) with a gradient"),
        (lambda: (1.0, 1), TypeError, "loss of one element with a gradient, got float"),
        (lambda: (model.norm.weight.sum(), -1), ValueError, "weight takes a finite number >= 0"),
    ):
        with pytest.raises(kind, match=message):
            parallel_micro_batches(accumulator, lambda *_, result=result: result(), _BATCHES, 2)
    with (
        accumulator.micro_batch(),
        pytest.raises(RuntimeError, match=r"a micro_batch\(\) is open: end it first"),
    ):
        parallel_micro_batches(accumulator, _loss, _BATCHES)


def test_micro_batches_that_depend_on_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    accumulator = GradientAccumulator(model, _sgd(model.parameters()))

    def loss(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return module(x).square().sum(), len(x)

    inputs = [torch.randn(3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="got BatchNorm1d 1 with running statistics: call its"):
        parallel_micro_batches(accumulator, loss, inputs, 2)
    model.eval()
    parallel_micro_batches(accumulator, loss, inputs, 2)
    accumulator.step()

    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    counting = Counting(4, 4)
    counting.register_buffer("calls", torch.zeros(()))
    accumulator = GradientAccumulator(counting, _sgd(counting.parameters()))
    with pytest.raises(RuntimeError, match="do not write its buffers, got one that wrote calls"):
        parallel_micro_batches(accumulator, loss, inputs, 2)
    assert accumulator.micro_batches == 0
